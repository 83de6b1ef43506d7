"""Where a norm's bias can go: W b is a constant, and a reader's own bias can take it."""

from __future__ import annotations

from normconvert.ir.graph import Graph, Norm, Ref
from normconvert.rules.axes import Track
from normconvert.rules.readers import Readers, outputs_of
from normconvert.rules.scaling import Contraction, Origins, follow, identity


def find_slots(
    graph: Graph, origins: Origins, norms: tuple[Norm, ...], found: Readers
) -> dict[str, str] | None:
    """For each reader the bias that can take W b; None unless all have one of their own.

    A constant goes the way of a scaling only where elements are merely rearranged. The bias
    must be added to the rows of that product in order, and to nothing else.
    """
    constant = follow(graph, outputs_of(graph, norms), rearrange_only=True)
    if constant.stops or set(constant.contractions) != set(found.contractions):
        return None
    slots: dict[str, str] = {}
    additions: dict[str, set[int]] = {}
    for contraction in found.contractions:
        pair = _linear(graph, origins, contraction)
        if pair is None or slots.setdefault(*pair) != pair[1]:
            return None
        additions.setdefault(pair[1], set()).add(contraction.node)
    whole = all(
        identity(Track(reader.axis, reader.index), len(reader.index))
        for reader in found.readers.values()
    )
    if not whole or set(slots) != set(found.readers) or len(additions) != len(slots):
        return None
    if any(not _added_only_at(graph, slot, nodes) for slot, nodes in additions.items()):
        return None
    return slots


def _linear(graph: Graph, origins: Origins, contraction: Contraction) -> tuple[str, str] | None:
    """The weight and the bias of the product, if it is x Wᵀ + c with W and c as stored."""
    node = graph.nodes[contraction.node]
    if node.op != "addmm" or node.argument("beta", 1) != 1 or node.argument("alpha", 1) != 1:
        return None
    added = node.argument("self")
    assert isinstance(added, Ref)
    weight, bias = origins.of(contraction.other), origins.of(added.value)
    if weight is None or bias is None or len(weight) != 1 or len(bias) != 1:
        return None
    if not (weight[0].plain and bias[0].plain):
        return None
    rows = graph.values[node.outputs[0]].shape[-1]
    row_tracks = [t for t in weight[0].tracks if t is None or t.axis != contraction.other_axis]
    if not isinstance(rows, int) or len(row_tracks) != 1 or len(bias[0].tracks) != 1:
        return None
    in_order = identity(row_tracks[0], rows) and identity(bias[0].tracks[0], rows)
    return (weight[0].tensor, bias[0].tensor) if in_order else None


def _added_only_at(graph: Graph, slot: str, nodes: set[int]) -> bool:
    value = graph.leaf_values[slot]
    (size,) = graph.values[value].shape
    assert isinstance(size, int)
    ends = follow(graph, {value: Track(0, range(size))}, parts=True, rearrange_only=True)
    return not ends.contractions and {stop.node for stop in ends.stops} <= nodes
