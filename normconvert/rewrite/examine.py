"""What a plan could not know without the values of the gains: folds that would do no good."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from normconvert.ir.expression import Divide, Tensor
from normconvert.ir.plan import IDENTITY
from normconvert.rewrite.evaluate import Evaluator
from normconvert.torch_dtypes import TORCH_DTYPE

if TYPE_CHECKING:
    from normconvert.ir.plan import Plan, Verdict
    from normconvert.source import Checkpoint

NO_QUOTIENT = "its bias has no place to go, and bias / gain is not finite in its stored dtype"


def examine(plan: Plan, checkpoint: Checkpoint) -> dict[str, str]:
    """The norms among the plan's folds that must stay after all, each with the reason.

    Reads only gains and biases.
    """
    divided = {edit.tensor for edit in plan.edits if isinstance(edit.expression, Divide)}
    dtypes = {edit.tensor: edit.dtype for edit in plan.edits}
    keep: dict[str, str] = {}
    with Evaluator(checkpoint) as evaluator:
        for verdict in plan.folded:
            reason = _reason(verdict, divided, dtypes, evaluator)
            if reason is not None and not (reason == IDENTITY and plan.native):
                keep[verdict.norm] = reason
    return keep


def _reason(
    verdict: Verdict, divided: set[str], dtypes: dict[str, str], evaluator: Evaluator
) -> str | None:
    assert verdict.gain is not None
    gain = evaluator.vector(Tensor(verdict.gain), 0) + verdict.offset
    stays = verdict.bias is None or verdict.bias in divided
    bias = torch.zeros(()) if verdict.bias is None else evaluator.vector(Tensor(verdict.bias), 0)
    if not bool(gain.isfinite().all()):
        return "its gain has values that are not finite"
    if bool((gain == 1).all()) and (stays or not bool(bias.any())):
        return IDENTITY
    if verdict.bias is not None and verdict.bias in divided:
        stored = TORCH_DTYPE[dtypes[verdict.bias]]
        quotient = torch.where(bias == 0, 0.0, bias / gain).to(stored)
        if not bool(quotient.isfinite().all()):
            return NO_QUOTIENT
    return None
