"""Plan: rules look at the graph, one after the other; the result is pure data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from normconvert.errors import PlanError
from normconvert.ir.expression import Expression, Tensor, tensors
from normconvert.ir.graph import Graph
from normconvert.ir.plan import STORED_DTYPE, Dtype, Edit, Plan, Tied
from normconvert.rules.flashnorm import flashnorm
from normconvert.rules.proposal import UNTIED, Request, Rule
from normconvert.rules.scaling import Origins

if TYPE_CHECKING:
    from normconvert.source import Checkpoint

RULES: Mapping[str, Rule] = {"flashnorm": flashnorm}
"""Every rewrite by its name."""

_FLOATING = frozenset(STORED_DTYPE.values())


def make_plan(
    graph: Graph,
    checkpoint: Checkpoint,
    rules: tuple[str, ...],
    *,
    tied: Tied = "keep",
    dtype: Dtype = "keep",
    keep: Mapping[str, str] | None = None,
) -> Plan:
    """What `rules`, in this order, do to `checkpoint`, whose model is `graph`.

    `keep` maps norms that must stay to the reason. Reads no weights.

    Raises:
        PlanError: a tensor that would change is not stored as floating point.
    """
    request = Request(tied=tied, keep=keep or {})
    expressions: dict[str, Expression] = {name: Tensor(name) for name in checkpoint.tensors}
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in checkpoint.tensors.items()}
    config: dict[str, object] = {}
    for name in rules:
        proposal = RULES[name](graph, expressions, request)
        for copy, original in proposal.copies.items():
            shapes.setdefault(copy, shapes[original])
            dtypes.setdefault(copy, dtypes[original])
        expressions.update(proposal.expressions)
        config.update(proposal.config)
    if config.get(UNTIED[0]) == UNTIED[1]:
        for copy, original in _cut_ties(graph, expressions).items():
            expressions[copy] = expressions[original]
            shapes[copy], dtypes[copy] = shapes[original], dtypes[original]
    if dtype != "keep":
        config["dtype"] = dtype
        dtypes = {
            name: STORED_DTYPE[dtype] if stored in _FLOATING else stored
            for name, stored in dtypes.items()
        }
    edits = tuple(
        Edit(tensor=name, dtype=dtypes[name], shape=shapes[name], expression=expression)
        for name, expression in expressions.items()
        if expression != Tensor(name) or dtypes[name] != checkpoint.tensors[name].dtype
    )
    _require_floating(checkpoint, edits)
    return Plan(
        model=graph.model,
        rules=rules,
        verdicts=proposal.verdicts,
        edits=edits,
        config=tuple(config.items()),
        notes=_notes(graph, edits),
    )


def _cut_ties(graph: Graph, expressions: Mapping[str, Expression]) -> dict[str, str]:
    """Every other tied parameter, and the tensor that it needs its own copy of.

    One switch in config.json cuts all ties of a model, a shared block's as well as the head's.

    Raises:
        PlanError: a tied parameter cannot be stored on its own.
    """
    origins = Origins(graph)
    copies: dict[str, str] = {}
    for tie in graph.ties:
        if tie.stored or tie.tensor in expressions:
            continue
        original = origins.tensor(graph.parameter_values[tie.source])
        if tie.tensor is None or original is None:
            raise PlanError(
                f"{tie.parameter!r} is tied to {tie.source!r} and cannot be stored on its own; "
                "give --tied keep."
            )
        copies[tie.tensor] = original
    return copies


def _require_floating(checkpoint: Checkpoint, edits: tuple[Edit, ...]) -> None:
    for edit in edits:
        for name in sorted(tensors(edit.expression)):
            if checkpoint.tensors[name].dtype not in _FLOATING:
                raise PlanError(
                    f"{name!r} in {checkpoint.paths[name]} is stored as "
                    f"{checkpoint.tensors[name].dtype}; it would have to change, and only "
                    "floating-point weights can. Convert the unquantised checkpoint."
                )


def _notes(graph: Graph, edits: tuple[Edit, ...]) -> tuple[str, ...]:
    """Tensors that the model class does not know may be read together with one that changes."""
    if not graph.unread:
        return ()
    shared = [edit.tensor for edit in edits if not any(c.isdigit() for c in edit.tensor)]
    note = (
        f"{len(graph.unread)} tensors are unknown to {graph.model} and stay as they are "
        f"(such as {graph.unread[0]})"
    )
    if shared:
        note += f"; code that reads them together with {shared[0]} must know that it changed"
    return (note + ".",)
