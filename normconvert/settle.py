"""Settle: the final plan, after a look at the few values that decide what is worth doing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, get_args

from normconvert.errors import PlanError, TraceError
from normconvert.ir.native import native_of, starred
from normconvert.ir.plan import IDENTITY, Dtype, Format, Tied
from normconvert.models import OWN_TYPES
from normconvert.planner import REWRITES, make_plan
from normconvert.rewrite import examine, preview, rules_in_manifest
from normconvert.source import at_hand
from normconvert.trace import trace

if TYPE_CHECKING:
    from normconvert.ir.graph import Graph
    from normconvert.ir.plan import Plan
    from normconvert.source import Checkpoint


FORMATS, TIED = get_args(Format), get_args(Tied)
DTYPES = (*get_args(Dtype), "float64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked for."""

    rewrites: tuple[str, ...]
    format: Format
    tied: Tied
    dtype: Dtype
    fraction: float
    target: str | None = None
    returns: tuple[str, ...] = ()


def settle(graph: Graph, checkpoint: Checkpoint, request: Request) -> tuple[Plan, bool]:
    """The plan, and whether there is nothing left to do.

    Raises:
        PlanError: nothing that was asked for can be done.
    """
    _require_possible(checkpoint, request)
    asked = {rule for rewrite in request.rewrites for rule in REWRITES[rewrite]}
    done = set(rules_done(checkpoint))
    stock = native_of(checkpoint.config) is None
    rules = tuple(asked - (done - {"flashnorm"} if stock else done))
    plan_with = partial(
        make_plan,
        graph,
        checkpoint,
        rules,
        format=request.format,
        tied=request.tied,
        dtype=request.dtype,
        fraction=request.fraction,
    )
    keep = gains_that_stay(plan_with(), checkpoint)
    plan = plan_with(keep=keep)
    already = bool(asked & done) or any(v.reason == IDENTITY for v in plan.verdicts)
    if _does_what_was_asked(plan, request) or (already and plan.edits):
        if plan.native is not None:
            plan = _running(partial(plan_with, keep=keep), checkpoint, graph)
        return plan, False
    if already and request.target is None:
        return plan, True
    raise PlanError(
        f"No norm of {checkpoint.model} can be {_DONE[request.rewrites[-1]]}: "
        f"{_why_not(plan, request.rewrites[-1])}"
    )


def gains_that_stay(plan: Plan, checkpoint: Checkpoint) -> dict[str, str]:
    """The norms among the plan's folds whose values say that they stay, each with the reason."""
    vectors = {name for verdict in plan.folded for name in (verdict.gain, verdict.bias) if name}
    with at_hand(checkpoint, vectors) as near:
        return examine(plan, near)


def rules_done(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The rules that an earlier conversion applied to `checkpoint`."""
    native = native_of(checkpoint.config)
    return rules_in_manifest(checkpoint) if native is None else native.rules


def _running(plan_with: Callable[..., Plan], checkpoint: Checkpoint, before: Graph) -> Plan:
    """A plan whose model runs: traced on fake tensors, because code may know its sizes by heart.

    A module that fails on a compressed stream is kept at its full width.

    Raises:
        PlanError: it does not run for another reason.
    """
    full_width: frozenset[str] = frozenset()
    while True:
        plan = plan_with(full_width=full_width)
        error = _failure(plan, checkpoint, before)
        if error is None:
            return plan
        failed = starred(error.module)
        if "crmsnorm" not in plan.rules or not failed or failed in full_width:
            raise PlanError(
                f"{plan.model} does not run when it is changed so ({error}) Use another rewrite "
                f"than {plan.rules[-1]}, or --format stock."
            ) from error
        full_width |= {failed}


def _failure(plan: Plan, checkpoint: Checkpoint, before: Graph) -> TraceError | None:
    """Why the model that `plan` makes does not run, as a whole or in a tower that did `before`."""
    with TemporaryDirectory() as folder:
        try:
            graph = trace(preview(plan, checkpoint, Path(folder)), further=False)
        except TraceError as error:
            return error
    known = {each.what for each in before.failed}
    for each in graph.failed:
        if each.what not in known:
            return TraceError(each.why, module=each.module)
    assert plan.native is not None
    unread = set(plan.native.biases) & set(graph.unread)
    return TraceError(f"{min(unread)} is not read.") if unread else None


_DONE = {
    "flashnorm": "folded",
    "rmsnorm": "made an RMSNorm",
    "crmsnorm": "made a CRMSNorm",
    "prmsnorm": "made a pRMSNorm",
}


def _require_possible(checkpoint: Checkpoint, request: Request) -> None:
    words = {"format": FORMATS, "tied": TIED, "dtype": DTYPES}
    for name, allowed in words.items():
        if getattr(request, name) not in allowed:
            raise PlanError(
                f"{name} is {getattr(request, name)!r}; it may be {', '.join(allowed)}."
            )
    if not request.rewrites:
        raise PlanError(f"No rewrite is asked for; there are {', '.join(REWRITES)}.")
    for rewrite in request.rewrites:
        if rewrite not in REWRITES:
            raise PlanError(f"There is no rewrite {rewrite!r}; there are {', '.join(REWRITES)}.")
    if not 0 < request.fraction <= 1:
        raise PlanError(f"The fraction {request.fraction:g} is not between 0 and 1.")
    known = native_of(checkpoint.config)
    native = known is not None
    asked = {rule for rewrite in request.rewrites for rule in REWRITES[rewrite]}
    if known is not None and {"rmsnorm", "crmsnorm"} & (asked - set(known.rules)):
        raise PlanError(
            f"{checkpoint.model} is converted already ({', '.join(known.rules)}); convert its "
            "original, so that every weight is rounded once."
        )
    if request.target is not None:
        _require_retargetable(checkpoint, request)
    if request.format == "native":
        if "auto_map" in checkpoint.config and not native:
            raise PlanError(
                f"{checkpoint.model} brings its own model code, which the native format cannot "
                f"build upon; {_instead(request)}."
            )
        if checkpoint.model_class is not None:
            raise PlanError(
                f"{checkpoint.model_class.__name__} is your own class, which the native format "
                f"cannot build upon; {_instead(request)}."
            )
        if checkpoint.config.get("model_type") in OWN_TYPES:
            raise PlanError(
                f"Only normconvert knows the model_type {checkpoint.config['model_type']!r}, and "
                f"the native format is to load without it; {_instead(request)}."
            )
        return
    if native:
        raise PlanError(f"{checkpoint.model} is in the native format; give --format native.")
    for rewrite in {"crmsnorm", "prmsnorm"} & set(request.rewrites):
        raise PlanError(f"No stock model has the norms of {rewrite}; the format has to be native.")


def _instead(request: Request) -> str:
    if {"crmsnorm", "prmsnorm"} & set(request.rewrites):
        return "flashnorm and rmsnorm can convert it, with --format stock"
    return "give --format stock"


def _require_retargetable(checkpoint: Checkpoint, request: Request) -> None:
    if request.format != "stock" or "rmsnorm" not in request.rewrites:
        raise PlanError("A target is for the rewrite rmsnorm in the stock format alone.")
    if "auto_map" in checkpoint.config or checkpoint.model_class is not None:
        raise PlanError(f"{checkpoint.model} brings its own model code; give no --target.")
    if "rmsnorm" in rules_in_manifest(checkpoint):
        raise PlanError(
            f"{checkpoint.model} is converted already; convert its original, so that every weight "
            "is rounded once."
        )


def _does_what_was_asked(plan: Plan, request: Request) -> bool:
    return any(plan.changed(rewrite) for rewrite in request.rewrites)


def _why_not(plan: Plan, rewrite: str) -> str:
    """The reason that most of the norms share, of the LayerNorms if there are any."""
    kept = plan.kept(rewrite)
    if not kept:
        return f"{plan.model} has none that is known."
    kept = tuple(verdict for verdict in kept if verdict.kind == "layernorm") or kept
    reasons = Counter(starred(verdict.reason) for verdict in kept)
    reason, count = reasons.most_common(1)[0]
    first = next(verdict for verdict in kept if starred(verdict.reason) == reason)
    return f"{first.norm} is kept because {first.reason} ({count} of {len(kept)} norms)."
