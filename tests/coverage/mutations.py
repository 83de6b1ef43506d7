"""Wrong conversions on purpose: does the certificate catch them, does comparing the outputs?

Each model is converted with `flashnorm`, then one edit is left out, or one element that an edit
wrote is moved. What comparing the outputs can see depends on the dtype: below the noise floor of
narrow weights no difference in the outputs says anything.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file, save_file

import normconvert
from normconvert.ir.event import ignore
from normconvert.ir.plan import Plan
from normconvert.precision import float64
from normconvert.source import open_checkpoint
from normconvert.verify import certify
from normconvert.verify.loading import load_model
from normconvert.verify.logits import compare
from normconvert.verify.tokens import input_sets

MOVED_BY = 2.0**-7  # of the element: its last place, were it stored in bfloat16
FELT = 1e-12  # of the largest output; less is float64's own, as of a key's bias behind a softmax
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """A wrong conversion of the model `name`. `felt`: its outputs differ from the right one's.

    `certificate` and `outputs`: whether these caught it.
    """

    name: str
    kind: str
    tensor: str
    felt: bool
    certificate: bool
    outputs: bool


def mutations(name: str, folder: Path, dtype: torch.dtype) -> tuple[Mutation, ...]:
    """One edit left out and one element moved in a conversion of the model called `name`.

    Nothing if it cannot be converted. The checkpoint is stored in `dtype`.
    """
    source, output = folder / "source", folder / "output"
    tiny.build(name).to(dtype).save_pretrained(source)
    try:
        conversion = normconvert.convert(source, output, verify=False)
    except (normconvert.PlanError, normconvert.TraceError):
        return ()
    before, right = load_file(source / WEIGHTS), load_file(output / WEIGHTS)
    plan = conversion.inspection.plan
    edited = [edit.tensor for edit in plan.edits]
    expected = _outputs(output)
    return tuple(
        _judged(name, kind, tensor, {**right, tensor: wrong}, expected, plan, source, output)
        for kind, tensor, wrong in _wrong(name, edited, before, right)
    )


def _wrong(
    name: str,
    edited: list[str],
    before: Mapping[str, torch.Tensor],
    right: Mapping[str, torch.Tensor],
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """The kind of mutation, the tensor and what it becomes."""
    choose = random.Random(name)
    tensor = choose.choice(edited)
    yield "edit left out", tensor, before[tensor]
    tensor = choose.choice([each for each in edited if bool((right[each] != 0).any())])
    moved = right[tensor].clone()
    elements = moved.view(-1)
    index = choose.choice(elements.nonzero().flatten().tolist())
    elements[index] *= 1 + MOVED_BY
    yield "element moved", tensor, moved


def _judged(
    name: str,
    kind: str,
    tensor: str,
    weights: dict[str, torch.Tensor],
    expected: torch.Tensor,
    plan: Plan,
    source: Path,
    output: Path,
) -> Mutation:
    save_file(weights, output / WEIGHTS, metadata={"format": "pt"})
    original, converted = open_checkpoint(str(source)), open_checkpoint(str(output))
    report = compare(
        original,
        converted,
        text=None,
        dtype=None,
        returns=(),
        certificate=None,
        algebra=None,
        centered=False,
        trust_remote_code=False,
        listen=ignore,
    )
    felt = bool((_outputs(output) - expected).abs().max() > FELT * expected.abs().max())
    return Mutation(
        name=name,
        kind=kind,
        tensor=tensor,
        felt=felt,
        certificate=not certify(plan, original, converted, ignore).valid,
        outputs=not report.equivalent,
    )


def _outputs(folder: Path) -> torch.Tensor:
    """What is compared, of the model in `folder`: its logits, or its last hidden states."""
    checkpoint = open_checkpoint(str(folder))
    model = load_model(checkpoint, torch.float64, trust_remote_code=False)
    sets, _ = input_sets(model, checkpoint, None, trust_remote_code=False)
    with torch.no_grad(), float64():
        output = model(**next(iter(sets.values())))
    found: torch.Tensor = getattr(output, "logits", output[0])
    pooled = getattr(output, "pooler_output", None)
    return found if pooled is None else torch.cat([found.flatten(), pooled.flatten()])
