"""Which tensors of the checkpoint a value consists of, and along which axes they lie in it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from typing import TYPE_CHECKING

from normconvert.ir.graph import Graph
from normconvert.rules.axes import Track
from normconvert.rules.scaling import PRODUCTS, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors of the checkpoint inside a value: a track for each of their own axes, if known.

    Several, such as stacked experts, if the tracks are the same for all. `plain` says that their
    elements are unchanged, only rearranged.
    """

    tensors: tuple[str, ...]
    tracks: tuple[Track | None, ...]
    plain: bool


class Origins:
    """Which tensors of the checkpoint a value is made of, worked out backwards and remembered."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._known: dict[int, tuple[Part, ...] | None] = {}

    def of(self, value: int) -> tuple[Part, ...] | None:
        """The parts of `value`, or None if anything else is in it.

        Multiplying a part by something else leaves it a part: a scaling still passes through.
        """
        if value not in self._known:
            self._known[value] = self._find(value)
        return self._known[value]

    def tensors(self, value: int) -> tuple[str, ...]:
        """The tensors of the checkpoint that `value` is made of; none if anything else is in it."""
        return tuple(tensor for part in self.of(value) or () for tensor in part.tensors)

    def single(self, value: int) -> Part | None:
        """The one tensor that `value` is made of, as its only part, or None."""
        parts = self.of(value)
        return parts[0] if parts and len(parts) == len(parts[0].tensors) == 1 else None

    def tensor(self, value: int) -> str | None:
        """The tensor of the checkpoint that `value` is, whole and in order, or None."""
        part, shape = self.single(value), self._graph.values[value].shape
        if part is None or not part.plain:
            return None
        tracks = part.tracks
        whole = len(tracks) == len(shape) and all(
            isinstance(size, int) and track == Track(axis, range(size))
            for axis, (track, size) in enumerate(zip(tracks, shape, strict=True))
        )
        return part.tensors[0] if whole else None

    def vector(self, value: int | None) -> str | None:
        """The one-dimensional tensor that `value` is, as `tensor` finds it."""
        if value is None or len(self._graph.values[value].shape) != 1:
            return None
        return self.tensor(value)

    def _find(self, value: int) -> tuple[Part, ...] | None:
        graph = self._graph
        if value in graph.leaf_names:
            shape = graph.values[value].shape
            ranges = (range(size) for size in shape if isinstance(size, int))
            tracks = tuple(Track(axis, index) for axis, index in enumerate(ranges))
            return (Part((graph.leaf_names[value],), tracks, plain=True),)
        producer = graph.producers.get(value)
        if producer is None:
            return None
        node = graph.nodes[producer]
        if node.op in ("cat", "stack"):
            found = [self.of(each) for each in node.inputs]
            if any(parts is None for parts in found):
                return None
            carry = self._carrier(producer, value)
            return _alike(
                carry(part, operand) for operand, parts in enumerate(found) for part in parts or ()
            )
        operands = [i for i, each in enumerate(node.inputs) if self.of(each) is not None]
        if len(operands) != 1 or node.op in ("norm", "overwritten"):
            return None
        parts = self.of(node.inputs[operands[0]])
        carry = self._carrier(producer, value)
        carried = tuple(carry(part, operands[0]) for part in parts or ())
        return carried if any(t is not None for p in carried for t in p.tracks) else None

    def _carrier(self, producer: int, value: int) -> Callable[[Part, int], Part]:
        """A function from a part of an operand of the node `producer` to that part of `value`."""
        stack = self._graph.nodes[producer].op == "stack"
        carried = cache(partial(self._carried, producer, value))

        def carry(part: Part, operand: int) -> Part:
            # All that is stacked goes the same way: many experts cost no more than one.
            at = 0 if stack else operand
            found = [(None, False) if t is None else carried(at, t) for t in part.tracks]
            plain = part.plain and any(rearranged for _, rearranged in found)
            return Part(part.tensors, tuple(track for track, _ in found), plain=plain)

        return carry

    def _carried(
        self, producer: int, value: int, operand: int, track: Track
    ) -> tuple[Track | None, bool]:
        """What `track` of an operand becomes in `value`, and whether it is only rearranged."""
        graph = self._graph
        node = graph.nodes[producer]
        if node.op in PRODUCTS:
            return None, False
        seed = {node.inputs[operand]: track}
        for rearrange_only in (True, False):
            step = Step(graph, producer, seed, parts=True, rearrange_only=rearrange_only)
            if carried := step.run():
                return carried.get(value), rearrange_only
        return None, False


def _alike(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Neighbouring parts with the same tracks as one."""
    groups = groupby(parts, key=lambda part: (part.tracks, part.plain))
    return tuple(
        Part(tuple(tensor for part in group for tensor in part.tensors), tracks, plain=plain)
        for (tracks, plain), group in groups
    )
