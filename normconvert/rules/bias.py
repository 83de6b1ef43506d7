"""Where a norm's bias can go: W b is a constant, and a reader's own bias can take it."""

from __future__ import annotations

from collections.abc import Mapping

from normconvert.ir.graph import Graph, Norm, Ref
from normconvert.rules.axes import Track
from normconvert.rules.draft import Readers
from normconvert.rules.origins import Origins
from normconvert.rules.readers import outputs_of
from normconvert.rules.scaling import Contraction, follow, identity


def find_slots(
    graph: Graph, origins: Origins, norms: tuple[Norm, ...], found: Readers, *, add: bool
) -> dict[str, str] | None:
    """For each reader the bias that can take W b; None unless all have one of their own.

    With `add`, a Linear that has none may be given one. A constant goes the way of a scaling only
    where elements are merely rearranged. The bias must be added to the rows of that product in
    order, and to nothing else.
    """
    constant = follow(graph, outputs_of(graph, norms), rearrange_only=True)
    if constant.stops or set(constant.contractions) != set(found.contractions):
        return None
    named = {original: copy for copy, original in found.copies.items()}
    new = _open_biases(graph, origins) if add else {}
    slots: dict[str, str] = {}
    additions: dict[str, set[int]] = {}
    for contraction in found.contractions:
        pair = _linear(graph, origins, contraction, new)
        if pair is None:
            return None
        reader = named.get(pair[0], pair[0])
        if slots.setdefault(reader, pair[1]) != pair[1]:
            return None
        additions.setdefault(pair[1], set()).add(pair[2])
    whole = all(
        identity(Track(reader.axis, reader.index), len(reader.index))
        for reader in found.readers.values()
    )
    if not whole or set(slots) != set(found.readers) or len(additions) != len(slots):
        return None
    if any(not _added_only_at(graph, slot, nodes) for slot, nodes in additions.items()):
        return None
    return slots


def _open_biases(graph: Graph, origins: Origins) -> Mapping[tuple[str, str], str]:
    """(tensor, module) of every Linear that has that weight and no bias -> the bias's name."""
    found: dict[tuple[str, str], str] = {}
    for parameter, bias in graph.open_biases:
        tensor = origins.tensor(graph.parameter_values[parameter])
        if tensor is not None:
            found[tensor, parameter.rpartition(".")[0]] = bias
    return found


def _linear(
    graph: Graph, origins: Origins, contraction: Contraction, new: Mapping[tuple[str, str], str]
) -> tuple[str, str, int] | None:
    """The weight and the bias of the product, and the node that adds the bias.

    None if it is not x Wᵀ (+ c) with W and c as stored.
    """
    node = graph.nodes[contraction.node]
    weight = origins.single(contraction.other)
    if weight is None or not weight.plain:
        return None
    rows = graph.values[node.outputs[0]].shape[-1]
    row_tracks = [t for t in weight.tracks if t is None or t.axis != contraction.other_axis]
    if not isinstance(rows, int) or len(row_tracks) != 1 or not identity(row_tracks[0], rows):
        return None
    tensor = weight.tensors[0]
    if node.op == "addmm":
        plain = node.argument("beta", 1) == 1 and node.argument("alpha", 1) == 1
        added, where = node.argument("self"), contraction.node
    else:
        if (bias := new.get((tensor, node.module))) is not None:
            return tensor, bias, contraction.node
        plain, (added, where) = True, _added_behind(graph, origins, node.outputs[0])
    if not plain or not isinstance(added, Ref):
        return None
    constant = origins.single(added.value)
    if constant is None or not constant.plain:
        return None
    tracks = constant.tracks
    in_order = len(tracks) == 1 and identity(tracks[0], rows)
    return (tensor, constant.tensors[0], where) if in_order else None


def _added_behind(graph: Graph, origins: Origins, product: int) -> tuple[Ref | None, int]:
    """The vector that is added to a product once it has its shape, and the node that adds it."""
    value = product
    while True:
        readers = graph.consumers.get(value, ())
        if len(readers) != 1:
            return None, -1
        node = graph.nodes[readers[0]]
        if node.op in ("view", "_unsafe_view") and (
            graph.values[node.outputs[0]].shape[-1] == graph.values[product].shape[-1]
        ):
            value = node.outputs[0]
            continue
        other = [each for each in node.inputs if each != value]
        if node.op != "add" or len(other) != 1 or node.argument("alpha", 1) != 1:
            return None, -1
        return (Ref(other[0]), readers[0]) if origins.vector(other[0]) else (None, -1)


def _added_only_at(graph: Graph, slot: str, nodes: set[int]) -> bool:
    value = graph.leaf_values.get(slot)
    if value is None:
        return True
    (size,) = graph.values[value].shape
    assert isinstance(size, int)
    ends = follow(graph, {value: Track(0, range(size))}, parts=True, rearrange_only=True)
    return not ends.contractions and {stop.node for stop in ends.stops} <= nodes
