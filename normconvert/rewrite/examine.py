"""What a plan could not know without the values of the gains: folds that would do no good."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from normconvert.ir.expression import Divide, Tensor
from normconvert.rewrite.evaluate import Evaluator

if TYPE_CHECKING:
    from normconvert.ir.plan import Plan, Verdict
    from normconvert.source import Checkpoint

IDENTITY = "its gain is the identity already"
DIVISION_BY_ZERO = "its bias has no place to go and cannot stay as bias / gain: a gain is zero"


def examine(plan: Plan, checkpoint: Checkpoint) -> dict[str, str]:
    """The norms among the plan's folds that must stay after all, each with the reason.

    Reads only gains and biases.
    """
    divided = {edit.tensor for edit in plan.edits if isinstance(edit.expression, Divide)}
    keep: dict[str, str] = {}
    with Evaluator(checkpoint) as evaluator:
        for verdict in plan.folded:
            if reason := _reason(verdict, divided, evaluator):
                keep[verdict.norm] = reason
    return keep


def _reason(verdict: Verdict, divided: set[str], evaluator: Evaluator) -> str | None:
    assert verdict.gain is not None
    gain = evaluator.vector(Tensor(verdict.gain), 0) + verdict.offset
    stays = verdict.bias is None or verdict.bias in divided
    bias = torch.zeros(()) if verdict.bias is None else evaluator.vector(Tensor(verdict.bias), 0)
    if not bool(gain.isfinite().all()):
        return "its gain has values that are not finite"
    if bool((gain == 1).all()) and (stays or not bool(bias.any())):
        return IDENTITY
    if verdict.bias in divided and bool(((gain == 0) & (bias != 0)).any()):
        return DIVISION_BY_ZERO
    return None
