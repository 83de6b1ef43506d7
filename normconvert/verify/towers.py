"""What a model makes of images and sound: its towers, its projectors, and the text beside them."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from transformers.utils import ModelOutput

from normconvert.images import accepted
from normconvert.model_inputs import longest
from normconvert.towers import tower_passes
from normconvert.verify.tokens import LENGTH, SEQUENCES, moved_to, random_like

_BETWEEN = 3
"""Tokens in front of each image in a text, and behind the last one."""


def tower_outputs(model: Any) -> dict[str, Any]:
    """What `model` returns where text alone does not reach, by what was run and on what.

    A pass that fails is left out: it needs more than is known of it, and was not traced either.
    """
    generator = torch.Generator().manual_seed(0)
    found = {}
    for each in tower_passes(model, SEQUENCES, min(LENGTH, longest(model) or LENGTH)):
        inputs = tree_map(partial(_drawn, generator), each.inputs)
        inputs = tree_map(moved_to(model), inputs)
        kind = "spectra" if "input_features" in inputs else "images"
        name = f"{each.name}, {kind}" if each.name else f"{kind} and tokens"
        if name in found:
            continue
        with suppress(Exception):  # foreign code
            output = found[name] = each.run(**inputs)
            if each.name and not each.alone:
                found[f"{kind} in a text"] = _in_a_text(model, inputs, output)
    return found


def _drawn(generator: torch.Generator, given: Any) -> Any:
    """Random numbers for zeros, but not for sizes and tokens."""
    if not isinstance(given, torch.Tensor) or not given.is_floating_point():
        return given
    return random_like(generator, given)


def _in_a_text(model: Any, inputs: dict[str, Any], features: Any) -> Any:
    """What `model` returns of a text with places for the `features` of its `inputs`.

    Raises:
        StopIteration: its config does not say by what token a place is known.
    """
    names = ("image_token_id", "image_token_index")
    if "input_features" in inputs:
        names = ("audio_token_id", "audio_token_index")
    known = (getattr(model.config, name, None) for name in names)
    place = next(token for token in known if token is not None)
    ids: list[int] = []
    for rows in _rows(features):
        ids += [*range(1, 1 + _BETWEEN), *[place] * rows]
    tokens = moved_to(model)(torch.tensor([[*ids, *range(1, 1 + _BETWEEN)]]))
    kinds = (tokens == place).to(torch.int64)
    more = {"use_cache": False, "mm_token_type_ids": kinds, "decoder_input_ids": kinds}
    taken = accepted(model.forward)
    more = {name: value for name, value in more.items() if name in taken}
    return model(input_ids=tokens, **inputs, **more)


def _rows(features: Any) -> list[int]:
    """How many places each image or sound takes."""
    if isinstance(features, ModelOutput):
        features = next(
            features[name] for name in ("pooler_output", "last_hidden_state") if name in features
        )
    leaves = [leaf for leaf in tree_leaves(features) if isinstance(leaf, torch.Tensor)]
    if len(leaves) == 1 and leaves[0].ndim > 2:  # [images, places, features]
        return [int(one.flatten(0, -2).shape[0]) for one in leaves[0]]
    return [int(leaf.flatten(0, -2).shape[0]) for leaf in leaves]
