"""What a model makes of images and sound: its towers, its projectors, and the text beside them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from normconvert.model_inputs import longest
from normconvert.towers import in_a_text, tower_passes
from normconvert.verify.tokens import LENGTH, SEQUENCES, drawn_like, moved_to

if TYPE_CHECKING:
    from normconvert.towers import Pass


def tower_outputs(model: Any) -> dict[str, Any]:
    """What `model` returns where text alone does not reach, by what was run and on what.

    A pass that fails is left out: it needs more than is known of it, and was not traced either.
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}

    def run(each: Pass) -> Any:
        output = found[_name(each)] = each.run(**tree_map(moved_to(model), each.inputs))
        return output

    for each in tower_passes(model, SEQUENCES, min(LENGTH, longest(model) or LENGTH)):
        drawn = replace(each, inputs=tree_map(partial(drawn_like, generator), each.inputs))
        if _name(each) in found:
            continue
        with suppress(Exception):  # foreign code
            beside = in_a_text(model, drawn, run(drawn))
            if beside is not None:
                run(beside)
    return found


def _name(each: Pass) -> str:
    return ", ".join(filter(None, [each.name, each.what]))
