"""A plan in numbers: what `inspect` shows, and what a conversion reports of what it changed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from normconvert.cost import DISK_SPEED, estimate
from normconvert.ir.report import Inspection
from normconvert.planner import REWRITES, make_plan
from normconvert.settle import gains_that_stay, rules_done

if TYPE_CHECKING:
    from normconvert.ir.graph import Graph
    from normconvert.ir.plan import Format, Plan, Tied
    from normconvert.source import Checkpoint


def plan_to_show(graph: Graph, checkpoint: Checkpoint, tied: Tied) -> Plan:
    """The plan of flashnorm; of what is converted already, only what is left of it to do."""
    plan_with = partial(make_plan, graph, checkpoint, REWRITES["flashnorm"], tied=tied)
    plan = plan_with()
    if not rules_done(checkpoint):
        return plan
    rest = plan_with(keep=gains_that_stay(plan, checkpoint))
    verdicts = (  # a norm whose gain has moved is read all the same
        replace(after, readers=before.readers)
        for before, after in zip(plan.verdicts, rest.verdicts, strict=True)
    )
    return replace(rest, verdicts=tuple(verdicts))


def inspection_of(
    graph: Graph, checkpoint: Checkpoint, plan: Plan, disk_speed: int = DISK_SPEED
) -> Inspection:
    """What `plan` would do to the checkpoint, in numbers; `disk_speed` in bytes per second."""
    tensors = checkpoint.tensors
    format: Format = "stock" if plan.native is None else "native"
    untied = (
        make_plan(graph, checkpoint, plan.rules, format=format, tied="untie")
        if graph.ties
        else plan
    )
    return Inspection(
        model=checkpoint.model,
        commit=checkpoint.commit,
        done=rules_done(checkpoint),
        plan=plan,
        total_tensors=len(tensors),
        total_bytes=checkpoint.nbytes,
        changed_tensors=len(plan.edits),
        changed_bytes=sum(edit.nbytes for edit in plan.edits),
        omitted_bytes=sum(tensors[name].nbytes for name in plan.omitted),
        gain_bytes=sum(tensors[gain].nbytes for gain in {v.gain for v in plan.folded} if gain),
        added_bytes=_growth(checkpoint, plan),
        untied_bytes=_growth(checkpoint, untied),
        cost=estimate(plan, checkpoint, disk_speed),
    )


def _growth(checkpoint: Checkpoint, plan: Plan) -> int:
    stored = checkpoint.tensors
    gone = {*plan.omitted, *(edit.tensor for edit in plan.edits if edit.tensor in stored)}
    return sum(edit.nbytes for edit in plan.edits) - sum(stored[name].nbytes for name in gone)
