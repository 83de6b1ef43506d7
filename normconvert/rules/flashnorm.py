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
from dataclasses import dataclass, field, replace

from normconvert.ir.expression import AddProduct, Divide, Expression, Fill, Plus, Scale, spread
from normconvert.ir.graph import Graph, Norm
from normconvert.ir.native import NormClass, NormModule
from normconvert.ir.plan import Action, Verdict
from normconvert.rules.axes import Track
from normconvert.rules.bias import find_slots
from normconvert.rules.draft import Draft, Obstacle, Readers, Request, verdict_on
from normconvert.rules.origins import Origins
from normconvert.rules.readers import find_readers
from normconvert.rules.scaling import follow


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
            "all its readers are weights that nothing else reads, with a bias"
            if self.slots
            else "all its readers are weights that nothing else reads; bias / gain stays"
        )


def flashnorm(graph: Graph, origins: Origins, draft: Draft, request: Request) -> Draft:
    """Fold every norm whose gain provably can move into its readers."""
    verdicts: dict[str, Verdict] = {}
    for norms in _sharing_a_gain(graph, origins):
        outcome = _prove(graph, origins, norms, request)
        for norm in norms:
            verdicts[norm.module] = _verdict(origins, norm, outcome)
        if isinstance(outcome, _Fold):
            draft = _folded(draft, norms, outcome, request)
    return replace(
        draft,
        verdicts=(*draft.verdicts, *(verdicts[norm.module] for norm in graph.norms)),
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
        return Obstacle(
            "it ignores its input's scale as norms do, but follows no known formula", unknown=True
        )
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
    add = request.format == "native"
    slots = None if bias is None else find_slots(graph, origins, norms, readers, add=add)
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
            return graph.where(position)
    return None


def _verdict(origins: Origins, norm: Norm, outcome: _Fold | Obstacle) -> Verdict:
    folds = isinstance(outcome, _Fold)
    readers = outcome.readers.readers if isinstance(outcome, _Fold) else outcome.readers
    action: Action = "fold" if folds else "keep"
    unknown = isinstance(outcome, Obstacle) and outcome.unknown
    return verdict_on(
        origins, norm, "flashnorm", action, outcome.reason, tuple(readers), unknown=unknown
    )


def _folded(draft: Draft, norms: tuple[Norm, ...], fold: _Fold, request: Request) -> Draft:
    """The draft with the fold in it."""
    edits = _edits(draft, fold)
    copies = {**draft.copies, **fold.readers.copies}
    biases = {s: reader for reader, s in fold.slots.items() if s not in draft.expressions}
    draft = replace(
        draft,
        expressions={**draft.expressions, **edits},
        copies=copies,
        biases={**draft.biases, **biases},
    )
    if fold.bias is not None and not fold.slots:  # its bias / gain stays
        return draft
    readers = {norm.module: fold.readers for norm in norms}
    if request.format == "stock":
        return replace(draft, folded={**draft.folded, **readers})
    gone = {fold.gain} if fold.bias is None else {fold.gain, fold.bias}
    return replace(
        draft,
        omitted=draft.omitted | gone,
        norms={**draft.norms, **{norm.module: _weightless(draft, norm, fold) for norm in norms}},
        folded={**draft.folded, **readers},
    )


def _weightless(draft: Draft, norm: Norm, fold: _Fold) -> NormModule:
    """The module that does what `norm` did before its gain and bias."""
    known = draft.norms.get(norm.module)
    if known is not None:
        return replace(known, gain=False, bias=False, offset=0.0)
    kind: NormClass = "rmsnorm" if norm.kind == "rmsnorm" else "layernorm"
    return NormModule(module=norm.module, kind=kind, size=fold.size, eps=norm.eps)


def _edits(draft: Draft, fold: _Fold) -> dict[str, Expression]:
    """The new expression of each tensor that the fold touches."""
    current = draft.expressions
    gain = current[fold.gain]
    if fold.offset:
        gain = Plus(gain, fold.offset)
    edits: dict[str, Expression] = {fold.gain: Fill(1.0 - fold.offset)}
    if fold.bias is not None:
        edits[fold.bias] = Fill(0.0) if fold.slots else Divide(current[fold.bias], gain)
    for tensor, reader in fold.readers.readers.items():
        matrix = current.get(tensor) or current[fold.readers.copies[tensor]]
        edits[tensor] = Scale(matrix, reader.axis, spread(gain, reader.index, fold.size))
        if fold.bias is not None and fold.slots:
            slot = fold.slots[tensor]
            bias = current.get(slot, Fill(0.0))
            edits[slot] = AddProduct(bias, matrix, reader.axis, current[fold.bias])
    return edits
