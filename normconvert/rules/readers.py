"""Who reads a norm: the proof that a gain can move into the weights that read it.

The scaling by the gain is followed from the norm to every place where it ends. All of them
must be products with tensors of the checkpoint, scaled along the axis summed over, and every
other use of those tensors must be among the same products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Literal

from normconvert.ir.graph import Graph, Norm, Tie
from normconvert.rules.axes import Track
from normconvert.rules.draft import Obstacle, Reader, Readers
from normconvert.rules.origins import Origins, Part
from normconvert.rules.places import unread_beside
from normconvert.rules.scaling import Contraction, Ends, follow, same, straight_in

_NONE, _UNREAD = -1, -2


def outputs_of(graph: Graph, norms: tuple[Norm, ...]) -> dict[int, Track]:
    """The outputs of all calls of `norms`, tracked along their features."""
    seeds: dict[int, Track] = {}
    for norm in norms:
        for node in graph.norm_calls[norm.module]:
            (value,) = node.outputs
            shape = graph.values[value].shape
            assert isinstance(shape[-1], int)
            seeds[value] = Track(len(shape) - 1, range(shape[-1]))
    return seeds


def find_readers(
    graph: Graph, origins: Origins, norms: tuple[Norm, ...], tied: Literal["keep", "untie"]
) -> Readers | Obstacle:
    """The readers that can take the gain of `norms`, or what stands in the way."""
    seeds = outputs_of(graph, norms)
    ends = follow(graph, seeds)
    known = _names(origins, ends)
    if ends.stops:
        return Obstacle(ends.stops[0].reason, known, ends.stops[0].unknown)
    if not ends.contractions:
        return Obstacle("nothing reads it")
    if unseen := unread_beside(graph, ends.values, len(next(iter(seeds.values())).index)):
        return Obstacle(f"{unseen}, which was not read in the trace, may read it", known)
    indices: dict[str, Sequence[int]] = {}
    axes: dict[str, int] = {}
    for contraction in ends.contractions:
        where = graph.where(contraction.node)
        parts = origins.of(contraction.other)
        if parts is None:
            return Obstacle(f"it is multiplied with another activation in {where}", known)
        for tensor, part in ((name, each) for each in parts for name in each.tensors):
            axis = _axis(part, contraction)
            if axis is None or axes.setdefault(tensor, axis) != axis:
                return Obstacle(f"{tensor} is read along no single axis in {where}", known)
            index = _index(graph, tensor, part.tracks[axis], axis, contraction.track)
            index = index and _merged(index, indices.get(tensor, index))
            if index is None:
                return Obstacle(f"{tensor} would need two gains at once in {where}", known)
            indices[tensor] = index
    readers = {
        tensor: Reader(axes[tensor], _finished(index))
        for tensor, index in indices.items()
        if isinstance(index, range) or any(coordinate >= 0 for coordinate in index)
    }
    return _exclusive(graph, origins, readers, ends.contractions, tied)


def reader_outside(
    graph: Graph, value: int, track: Track, allowed: set[tuple[int, int]]
) -> str | None:
    """Where `value` is read other than by the `allowed` (node, operand) pairs; None if nowhere."""
    ends = follow(graph, {value: track}, parts=True)
    for contraction in ends.contractions:
        if (contraction.node, contraction.operand) not in allowed:
            return graph.where(contraction.node)
    for stop in ends.stops:
        return graph.where(stop.node)
    return None


def _names(origins: Origins, ends: Ends) -> tuple[str, ...]:
    found = (origins.tensors(contraction.other) for contraction in ends.contractions)
    return tuple(dict.fromkeys(chain.from_iterable(found)))


def _axis(part: Part, contraction: Contraction) -> int | None:
    """The tensors' own axis that lies along the axis summed over."""
    axes = [
        axis
        for axis, track in enumerate(part.tracks)
        if track is not None and track.axis == contraction.other_axis
    ]
    return axes[0] if len(axes) == 1 else None


def _index(
    graph: Graph, tensor: str, own: Track | None, axis: int, gain: Track
) -> Sequence[int] | None:
    """Which coordinate of the gain meets each slice of the tensor; None if two meet one."""
    size = graph.values[graph.leaf_values[tensor]].shape[axis]
    assert own is not None
    assert isinstance(size, int)
    if own.index == range(size):
        return gain.index
    found = [_UNREAD] * size
    for i, coordinate in zip(own.index, gain.index, strict=True):
        if i != _NONE and found[i] not in (_UNREAD, coordinate):
            return None
        if i != _NONE:
            found[i] = coordinate
    return tuple(found)


def _merged(one: Sequence[int], other: Sequence[int]) -> Sequence[int] | None:
    """Two indices of the same tensor as one; None if they disagree where both are read."""
    if same(one, other):
        return one
    pairs = list(zip(one, other, strict=True))
    if any(a != b and _UNREAD not in (a, b) for a, b in pairs):
        return None
    return tuple(max(pair) if _UNREAD in pair else pair[0] for pair in pairs)


def _finished(index: Sequence[int]) -> Sequence[int]:
    if isinstance(index, range):
        return index
    return tuple(_NONE if coordinate == _UNREAD else coordinate for coordinate in index)


def _exclusive(
    graph: Graph,
    origins: Origins,
    readers: Mapping[str, Reader],
    contractions: tuple[Contraction, ...],
    tied: Literal["keep", "untie"],
) -> Readers | Obstacle:
    """Nothing else may read the readers, save through a tie that the user allows to cut."""
    allowed = {(contraction.node, contraction.other) for contraction in contractions}
    found: dict[str, Reader] = {}
    copies: dict[str, str] = {}
    outside: dict[tuple[int, Track], str | None] = {}
    straight = straight_in(graph)
    for tensor, reader in readers.items():
        track = Track(reader.axis, reader.index)
        place = straight(graph.leaf_values[tensor], track)  # one for all of many experts
        if place not in outside:
            outside[place] = reader_outside(graph, *place, allowed)
        elsewhere = outside[place]
        ties = _ties(graph, origins, tensor)
        twin = next((t for tie in ties for t in _twins(graph, origins, tie, tensor)), None)
        if elsewhere is None and (twin is None or readers.get(twin) == reader):
            found[tensor] = reader
            continue
        tie, copy = _cut(graph, origins, ties, tensor, track, allowed)
        if tie is None or copy is None:
            reason = f"its reader {tensor} is also read by {elsewhere or f'what reads {twin}'}"
            return Obstacle(reason, tuple(readers))
        if tied == "keep":
            reason = (
                f"its reader {copy} is tied to {tie.source}; --tied untie gives it its own copy"
            )
            return Obstacle(reason, tuple(copy if t == tensor else t for t in readers))
        found[copy], copies[copy] = reader, tensor
    return Readers(readers=found, contractions=contractions, copies=copies)


def _ties(graph: Graph, origins: Origins, tensor: str) -> list[Tie]:
    """The ties that `tensor` takes part in."""
    return [
        tie
        for tie in graph.ties
        if any(tensor in _tensors(graph, origins, name) for name in (tie.parameter, tie.source))
    ]


def _tensors(graph: Graph, origins: Origins, parameter: str) -> set[str]:
    return set(origins.tensors(graph.parameter_values[parameter]))


def _twins(graph: Graph, origins: Origins, tie: Tie, tensor: str) -> set[str]:
    """What the tie keeps equal to `tensor` although it is stored too."""
    if not tie.stored:
        return set()
    both = (_tensors(graph, origins, name) for name in (tie.parameter, tie.source))
    return set().union(*both) - {tensor}


def _cut(
    graph: Graph,
    origins: Origins,
    ties: list[Tie],
    tensor: str,
    track: Track,
    allowed: set[tuple[int, int]],
) -> tuple[Tie, str] | tuple[None, None]:
    """The tie to cut so that `tensor` can change for this norm's readers alone."""
    for tie in ties:
        if copy := _copy(graph, origins, tie, tensor, track, allowed):
            return tie, copy
    return None, None


def _copy(
    graph: Graph,
    origins: Origins,
    tie: Tie,
    tensor: str,
    track: Track,
    allowed: set[tuple[int, int]],
) -> str | None:
    """The name for the tied parameter's own copy, if all that reads the norm reads only it."""
    value = graph.parameter_values[tie.parameter]
    if tie.tensor is None or reader_outside(graph, value, track, allowed) is not None:
        return None
    through = follow(graph, {value: track}, parts=True).contractions
    reached = {(contraction.node, contraction.operand) for contraction in through}
    needed = {(node, operand) for node, operand in allowed if tensor in origins.tensors(operand)}
    return tie.tensor if needed <= reached else None
