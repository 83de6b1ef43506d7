"""FlashNorm (arXiv 2407.09577): a norm's gain moves into the weights that read the norm.

    (x̂ ∘ g) Wᵀ = x̂ (W diag(g))ᵀ            eq. 2 and 3 of the paper, x̂ the normalised input

With a norm bias b and a linear bias c the constant moves along, c' = c + W b. Where a reader
has no bias, the norm keeps b / g instead: x̂ ∘ g + b = g ∘ (x̂ + b / g).

A fold is proved, not matched: the scaling by g is followed from the norm to every place where
it ends (`normconvert.rules.scaling`). All of them must be products with tensors that nothing
else reads; otherwise the norm is kept, with the place that stands in the way as the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from normconvert.ir.expression import AddProduct, Divide, Expression, Fill, Plus, Scale, spread
from normconvert.ir.graph import Graph, Norm
from normconvert.ir.plan import Verdict
from normconvert.rules.axes import Track
from normconvert.rules.bias import find_slots
from normconvert.rules.proposal import UNTIED, Proposal, Request
from normconvert.rules.readers import Obstacle, Readers, find_readers
from normconvert.rules.scaling import Origins, follow


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fold:
    """A proved fold: `slots` gives each reader's bias that takes W b; empty: b / g stays."""

    gain: str
    size: int
    bias: str | None
    offset: float
    readers: Readers
    slots: Mapping[str, str] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        if self.bias is None:
            return "all its readers are weights that nothing else reads"
        return (
            "all its readers are weights with a bias, which nothing else reads"
            if self.slots
            else "all its readers are weights that nothing else reads; bias / gain stays"
        )


def flashnorm(graph: Graph, expressions: Mapping[str, Expression], request: Request) -> Proposal:
    """Propose to fold every norm whose gain provably can move into its readers."""
    origins = Origins(graph)
    changed: dict[str, Expression] = {}
    copies: dict[str, str] = {}
    verdicts: dict[str, Verdict] = {}
    for norms in _sharing_a_gain(graph, origins):
        outcome = _prove(graph, origins, norms, request)
        for norm in norms:
            verdicts[norm.module] = _verdict(origins, norm, outcome)
        if isinstance(outcome, _Fold):
            changed.update(_edits({**expressions, **changed}, outcome))
            copies.update(outcome.readers.copies)
    return Proposal(
        verdicts=tuple(verdicts[norm.module] for norm in graph.norms),
        expressions=changed,
        copies=copies,
        config=dict([UNTIED]) if copies else {},
    )


def _sharing_a_gain(graph: Graph, origins: Origins) -> Iterator[tuple[Norm, ...]]:
    """The norms that share a gain tensor; norms without one by themselves."""
    shared: dict[str, list[Norm]] = {}
    for norm in graph.norms:
        shared.setdefault(origins.vector(norm.gain) or f"gain of {norm.module}", []).append(norm)
    yield from (tuple(norms) for norms in shared.values())


def _prove(
    graph: Graph, origins: Origins, norms: tuple[Norm, ...], request: Request
) -> _Fold | Obstacle:
    """A fold for all of `norms`, which share a gain, or what stands in the way."""
    norm = norms[0]
    if reason := next((request.keep[n.module] for n in norms if n.module in request.keep), None):
        return Obstacle(reason)
    if norm.kind == "unrecognised":
        return Obstacle("it ignores its input's scale as norms do, but follows no known formula")
    if norm.gain is None:
        return Obstacle("it has no gain")
    gain, bias = origins.vector(norm.gain), origins.vector(norm.bias)
    if gain is None or (bias is None and norm.bias is not None):
        return Obstacle("its gain is not stored as one vector")
    if gain == bias:
        return Obstacle(f"{gain} is its gain and its bias at once")
    if any((n.offset, origins.vector(n.bias)) != (norm.offset, bias) for n in norms):
        return Obstacle(f"norms of different kinds share {gain}")
    for tensor in (gain, bias):
        if tensor is not None and (place := _read_outside(graph, tensor, norms)):
            return Obstacle(f"{tensor} is also read by {place}")
    readers = find_readers(graph, origins, norms, request.tied)
    if isinstance(readers, Obstacle):
        return readers
    slots = None if bias is None else find_slots(graph, origins, norms, readers)
    (size,) = graph.values[norm.gain].shape
    assert isinstance(size, int)
    return _Fold(
        gain=gain, size=size, bias=bias, offset=norm.offset, readers=readers, slots=slots or {}
    )


def _read_outside(graph: Graph, tensor: str, norms: tuple[Norm, ...]) -> str | None:
    """Where a gain or bias is read outside of its norms; None if nowhere."""
    value = graph.leaf_values[tensor]
    (size,) = graph.values[value].shape
    assert isinstance(size, int)
    ends = follow(graph, {value: Track(0, range(size))}, parts=True)
    modules = {norm.module for norm in norms}
    for position in [end.node for end in ends.contractions] + [end.node for end in ends.stops]:
        node = graph.nodes[position]
        if position < 0 or node.op != "norm" or node.module not in modules:
            return node.module or graph.model
    return None


def _verdict(origins: Origins, norm: Norm, outcome: _Fold | Obstacle) -> Verdict:
    folds = isinstance(outcome, _Fold)
    readers = outcome.readers.readers if isinstance(outcome, _Fold) else outcome.readers
    return Verdict(
        norm=norm.module,
        kind=norm.kind,
        gain=origins.vector(norm.gain),
        bias=origins.vector(norm.bias),
        offset=norm.offset,
        eps=norm.eps,
        readers=tuple(readers),
        action="fold" if folds else "keep",
        reason=outcome.reason,
    )


def _edits(current: Mapping[str, Expression], fold: _Fold) -> dict[str, Expression]:
    """The new expression of each tensor that the fold touches."""
    gain = current[fold.gain]
    if fold.offset:
        gain = Plus(gain, fold.offset)
    edits: dict[str, Expression] = {fold.gain: Fill(1.0 - fold.offset)}
    if fold.bias is not None:
        edits[fold.bias] = Fill(0.0) if fold.slots else Divide(current[fold.bias], gain)
    for tensor, reader in fold.readers.readers.items():
        matrix = current[fold.readers.copies.get(tensor, tensor)]
        edits[tensor] = Scale(matrix, reader.axis, spread(gain, reader.index, fold.size))
        if fold.bias is not None and fold.slots:
            slot = fold.slots[tensor]
            edits[slot] = AddProduct(current[slot], matrix, reader.axis, current[fold.bias])
    return edits
