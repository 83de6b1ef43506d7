"""A plan in numbers: what `inspect` shows, and what a conversion reports of what it changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from normconvert.cost import DISK_SPEED, estimate
from normconvert.ir.report import Inspection
from normconvert.planner import make_plan
from normconvert.settle import rules_done

if TYPE_CHECKING:
    from normconvert.ir.graph import Graph
    from normconvert.ir.plan import Format, Plan
    from normconvert.source import Checkpoint


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
