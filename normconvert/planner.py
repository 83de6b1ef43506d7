"""Plan: rules look at the graph, one after the other; the result is pure data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from normconvert.errors import PlanError
from normconvert.ir.expression import DropLast, MinusLast, Tensor, tensors
from normconvert.ir.graph import Graph, Norm
from normconvert.ir.native import Native, merged, native_of
from normconvert.ir.plan import STORED_DTYPE, Dtype, Edit, Format, Plan, Tied, Verdict
from normconvert.rules.crmsnorm import crmsnorm
from normconvert.rules.draft import Draft, Request, Rule, verdict_on
from normconvert.rules.flashnorm import flashnorm
from normconvert.rules.origins import Origins
from normconvert.rules.prmsnorm import prmsnorm
from normconvert.rules.rmsnorm import rmsnorm

if TYPE_CHECKING:
    from normconvert.source import Checkpoint

RULES: Mapping[str, Rule] = {
    "rmsnorm": rmsnorm,
    "flashnorm": flashnorm,
    "crmsnorm": crmsnorm,
    "prmsnorm": prmsnorm,
}
"""Every rule by its name, in the order in which they run, however they are asked for."""

REWRITES: Mapping[str, tuple[str, ...]] = {
    "flashnorm": ("flashnorm",),
    "rmsnorm": ("rmsnorm", "flashnorm"),
    "crmsnorm": ("rmsnorm", "flashnorm", "crmsnorm"),
    "prmsnorm": ("prmsnorm",),
}
"""The rules of each command; the one of its own name is what it is for."""

_FLOATING = frozenset(STORED_DTYPE.values())


def make_plan(
    graph: Graph,
    checkpoint: Checkpoint,
    rules: tuple[str, ...],
    *,
    format: Format = "stock",
    tied: Tied = "keep",
    dtype: Dtype = "keep",
    fraction: float = 1.0,
    full_width: frozenset[str] = frozenset(),
    keep: Mapping[str, str] | None = None,
) -> Plan:
    """What `rules` do to `checkpoint`, whose model is `graph`.

    `fraction` is the share of the coordinates that a pRMSNorm looks at. `full_width` are modules
    (with * for numbers) that only run on all coordinates; `keep` maps norms whose gain must stay
    to the reason. Reads no weights.

    Raises:
        PlanError: a tensor that would change is not stored as floating point.
    """
    native = format == "native"
    request = Request(
        format=format, tied=tied, fraction=fraction, full_width=full_width, keep=keep or {}
    )
    origins = Origins(graph)
    draft = Draft(expressions={name: Tensor(name) for name in checkpoint.tensors})
    rules = tuple(name for name in RULES if name in rules)
    before = native_of(checkpoint.config)
    for name in rules:
        draft = RULES[name](graph, origins, draft, request)
    if draft.copies:
        draft = _cut_ties(graph, origins, draft)
    edits = _edits(checkpoint, draft, dtype)
    _require_floating(checkpoint, edits)
    omitted = tuple(name for name in checkpoint.tensors if name in draft.omitted)
    if dtype == "keep":
        _require_dtype(checkpoint, edits, omitted)
    config: dict[str, object] = {}
    if dtype != "keep":
        config["dtype"] = dtype
        if "torch_dtype" in checkpoint.config:  # its older name, which others go by
            config["torch_dtype"] = dtype
    if draft.copies:
        config[graph.tie_key] = False  # makes transformers keep tied parameters apart
    return Plan(
        model=graph.model,
        rules=rules,
        verdicts=(*draft.verdicts, *_not_run(graph, origins, rules)),
        edits=edits,
        omitted=omitted,
        native=merged(before, _native(graph, origins, draft, rules)) if native else None,
        config=tuple(config.items()),
        notes=(*_notes(graph, edits), *_failure_notes(graph), *_adapter_notes(checkpoint, edits)),
    )


def _not_run(graph: Graph, origins: Origins, rules: tuple[str, ...]) -> Iterator[Verdict]:
    """The verdicts on norms of which the trace says nothing: what reads them is not known."""
    for rule in rules:
        for norm in graph.not_run:
            reason = "no pass of the trace runs it"
            if why := _why_not_run(graph, norm):
                reason += f": {why.rstrip('.')}"
            yield verdict_on(origins, norm, rule, "keep", reason)


def _why_not_run(graph: Graph, norm: Norm) -> str | None:
    """Why the pass failed that would have run `norm`: its tower's, or one of what is behind it."""
    towers = [each for each in graph.failed if each.tower]
    own = (each for each in towers if f"{norm.module}.".startswith(f"{each.tower}."))
    behind = (each for each in towers if each.what != each.tower)
    found = next(own, None) or next(behind, None)
    return None if found is None else found.why


def modules_of(graph: Graph) -> dict[str, tuple[str, ...]]:
    """The modules of the model in which each tensor of the checkpoint is, or could be if untied."""
    origins = Origins(graph)
    found: dict[str, dict[str, None]] = {tensor: {} for tensor, _ in graph.leaves}
    for parameter, value in graph.parameters:
        for tensor in origins.tensors(value):
            found[tensor][parameter.rpartition(".")[0]] = None
    for tie in graph.ties:
        if tie.tensor is not None:
            found.setdefault(tie.tensor, {})[tie.parameter.rpartition(".")[0]] = None
    return {tensor: tuple(modules) for tensor, modules in found.items()}


def _cut_ties(graph: Graph, origins: Origins, draft: Draft) -> Draft:
    """Every other tied parameter gets its own copy of the tensor that it has been sharing.

    One switch in config.json cuts all ties of a model, a shared block's as well as the head's.

    Raises:
        PlanError: a tied parameter cannot be stored on its own.
    """
    copies = dict(draft.copies)
    expressions = dict(draft.expressions)
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
        expressions[tie.tensor] = expressions[original]
    return replace(draft, copies=copies, expressions=expressions)


def _edits(checkpoint: Checkpoint, draft: Draft, dtype: Dtype) -> tuple[Edit, ...]:
    """Every tensor of the output that differs from the source's, or is not in it."""
    stored = checkpoint.tensors
    edits = []
    for name, expression in draft.expressions.items():
        if name in draft.omitted:
            continue
        if name in draft.biases:
            model = stored[draft.copies.get(draft.biases[name], draft.biases[name])]
            shape: tuple[int, ...] = (model.shape[0],)
        else:
            model = stored[draft.copies.get(name, name)]
            shape = _shape(model.shape, draft, name)
        dtype_before = stored[name].dtype if name in stored else model.dtype
        kept = dtype == "keep" or model.dtype not in _FLOATING
        new = model.dtype if kept else STORED_DTYPE[dtype]
        if name not in stored or expression != Tensor(name) or new != dtype_before:
            edits.append(Edit(tensor=name, dtype=new, shape=shape, expression=expression))
    return tuple(edits)


def _shape(before: tuple[int, ...], draft: Draft, name: str) -> tuple[int, ...]:
    """The shape of a tensor of shape `before` after its expression."""
    shape = list(before)
    for axis in _shortened(draft, name):
        shape[axis] -= 1
    return tuple(shape)


def _shortened(draft: Draft, name: str) -> list[int]:
    """The axes that the expression of the tensor shortens by one."""
    found, expression = [], draft.expressions[name]
    while not isinstance(expression, Tensor) and hasattr(expression, "of"):
        if isinstance(expression, (DropLast, MinusLast)):
            found.append(expression.axis)
        expression = expression.of
    return found


def _native(graph: Graph, origins: Origins, draft: Draft, rules: tuple[str, ...]) -> Native:
    """What the draft changes in the model, by the names of its own parameters."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter, value in graph.parameters:
        known = graph.values[value].shape
        shape = [size for size in known if isinstance(size, int)]
        for part in origins.of(value) or ():
            for tensor in part.tensors:
                name = _stored_name(graph, draft, parameter, tensor)
                for axis in _shortened(draft, name):
                    track = part.tracks[axis]
                    if track is None:
                        raise PlanError(f"{tensor!r} becomes {parameter!r} in no known way.")
                    shape[track.axis] = len(track.index) - 1
        if tuple(shape) != known:
            shapes[parameter] = tuple(shape)
    return Native(
        rules=rules,
        auto_classes=graph.auto_classes,
        norms=tuple(draft.norms.values()),
        recenterings=draft.recenterings,
        full_width=draft.full_width,
        shapes=tuple(shapes.items()),
        biases=tuple(draft.biases),
    )


def _stored_name(graph: Graph, draft: Draft, parameter: str, tensor: str) -> str:
    """The tensor that a parameter is loaded from: its own copy, if its tie was cut."""
    ties = {tie.parameter: tie.tensor for tie in graph.ties}
    own = ties.get(parameter)
    return own if own is not None and own in draft.expressions else tensor


def _require_floating(checkpoint: Checkpoint, edits: tuple[Edit, ...]) -> None:
    for edit in edits:
        for name in sorted(tensors(edit.expression)):
            if checkpoint.tensors[name].dtype not in _FLOATING:
                raise PlanError(
                    f"{name!r} in {checkpoint.paths[name]} is stored as "
                    f"{checkpoint.tensors[name].dtype}; it would have to change, and only "
                    "floating-point weights can. Convert the unquantised checkpoint."
                )


def _require_dtype(
    checkpoint: Checkpoint, edits: tuple[Edit, ...], omitted: tuple[str, ...]
) -> None:
    """Without a dtype in config.json, transformers loads all in that of the tensor that is first.

    Raises:
        PlanError: that is another one in the output.
    """
    if {"dtype", "torch_dtype"} & checkpoint.config.keys():
        return
    before = {
        name: tensor.dtype
        for name, tensor in checkpoint.tensors.items()
        if tensor.dtype in _FLOATING
    }
    after = {name: dtype for name, dtype in before.items() if name not in omitted}
    after |= {edit.tensor: edit.dtype for edit in edits}
    for first in (min, lambda names: next(iter(names), "")):  # by name, or as they are stored
        if after and before[first(before)] != after[first(after)]:
            raise PlanError(
                f"{checkpoint.folder / 'config.json'} has no dtype, and the weights are stored in "
                f"{' and '.join(sorted({*before.values()}))}: the first of them decides in what "
                'transformers loads all, and the conversion changes which that is. Add "dtype" to '
                "the file."
            )


def _failure_notes(graph: Graph) -> tuple[str, ...]:
    """What the graph does not show, because it could not be run."""
    count = len(graph.failed)
    if not count:
        return ()
    passes = "1 pass" if count == 1 else f"{count} passes"
    what = ", ".join(each.what for each in graph.failed)
    return (f"{passes} of the trace could not be run ({what}): what only they show is not known.",)


def _adapter_notes(checkpoint: Checkpoint, edits: tuple[Edit, ...]) -> tuple[str, ...]:
    """Adapters are differences from the weights, and stay as they are."""
    found = min(checkpoint.folder.rglob("adapter_config.json"), default=None)
    if found is None or not edits:
        return ()
    place = found.relative_to(checkpoint.folder).parent
    return (f"The adapter in {place} fits the original's weights, not the converted ones.",)


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
