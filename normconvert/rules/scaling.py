"""Where a scaling of one axis goes: the proof behind every fold.

Suppose the elements of a value are multiplied by g along one axis. Operations that rearrange
or that are linear pass the scaling on; a contraction over the axis absorbs it if the other
operand is divided by g; everything else stops it. `follow` says for a whole graph where the
scaling ends; `normconvert.rules.origins`, which tensors of the checkpoint an operand consists of.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from normconvert.ir.graph import Graph, Node, Ref
from normconvert.rules.axes import Shape, Track, joined, move, stacked

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Contraction:
    """A product that sums over the scaled axis: the scaled value is input `operand` of `node`.

    `other` is the value that it is multiplied with and `other_axis` the axis summed there;
    `track` tells which coordinate each position of the sum has.
    """

    node: int
    operand: int
    other: int
    other_axis: int
    track: Track


@dataclass(frozen=True, slots=True)
class Stop:
    """A use that does not pass the scaling on."""

    node: int  # -1: an output of the model
    reason: str
    unknown: bool = False  # nothing is known against it: the operation, or this use of it, is new


@dataclass(frozen=True, slots=True)
class Ends:
    """Every place where a scaling ends, and the `values` that it reached before."""

    contractions: tuple[Contraction, ...]
    stops: tuple[Stop, ...]
    values: frozenset[int]


INDEPENDENT = frozenset({
    "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "empty_like",
    "full_like",
})  # fmt: skip
_SUMS = frozenset({"sum", "mean", "cumsum"})
NONLINEAR = frozenset({
    "abs", "amax", "argmax", "clamp", "clamp_min", "cos", "elu", "eq", "erf", "exp", "ge", "gelu",
    "gt", "hardsigmoid", "hardswish", "hardtanh", "le", "leaky_relu", "log", "logsumexp", "lt",
    "max", "maximum", "minimum", "ne", "pow", "prod", "reciprocal", "relu", "round", "rsqrt",
    "sigmoid", "silu", "sin", "softmax", "softplus", "sort", "sqrt", "tanh", "topk",
})  # fmt: skip
"""Operations that are known to pass neither a gain nor a shift on."""
PRODUCTS: Mapping[str, tuple[str, str]] = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "mv": ("self", "vec"),
    "dot": ("self", "tensor"),
}


def follow(
    graph: Graph, seeds: Mapping[int, Track], *, parts: bool = False, rearrange_only: bool = False
) -> Ends:
    """Every end of the scaling that `seeds` (value -> track) begins.

    With `parts`, a scaled piece may be joined with other tensors of the checkpoint, each of
    which is then scaled on its own account. With `rearrange_only`, linear operations stop it
    as well, so that a constant vector added to the seeds would go the same way.
    """
    tracks = dict(seeds)
    outputs = {value for _, value in graph.returned}
    contractions: list[Contraction] = []
    stops: list[Stop] = []
    queue = sorted({node for value in tracks for node in graph.consumers.get(value, ())})
    seen = set(queue)
    stops += [output_stop(graph, value) for value in tracks if value in outputs]
    while queue:
        position = heapq.heappop(queue)
        step = Step(graph, position, tracks, parts, rearrange_only)
        carried = step.run()
        contractions += step.contractions
        stops += step.stops
        for value, track in carried.items():
            if not _scales(track):
                continue
            tracks[value] = track
            if value in outputs:
                stops.append(output_stop(graph, value))
            for consumer in graph.consumers.get(value, ()):
                if consumer not in seen:
                    seen.add(consumer)
                    heapq.heappush(queue, consumer)
    return Ends(tuple(contractions), tuple(stops), frozenset(tracks))


def straight_in(graph: Graph) -> Callable[[int, Track], tuple[int, Track]]:
    """A function: where a scaling of a value is before it first meets a choice or an end.

    With its parts; what was found is remembered, as many experts have most of the way in common.
    """
    outputs = {output for _, output in graph.returned}

    @cache
    def straight(value: int, track: Track) -> tuple[int, Track]:
        consumers = graph.consumers.get(value, ())
        if value in outputs or len(consumers) != 1:
            return value, track
        node = graph.nodes[consumers[0]]
        if node.op == "stack":  # the same for all that is stacked: no need to look at the others
            return straight(node.outputs[0], stacked(node, graph.values[value].shape, track))
        step = Step(graph, consumers[0], {value: track}, parts=True, rearrange_only=False)
        carried = step.run()
        passed = not step.contractions and not step.stops and len(carried) == 1
        if not passed or not all(map(_scales, carried.values())):
            return value, track
        return straight(*next(iter(carried.items())))

    return straight


def output_stop(graph: Graph, value: int) -> Stop:
    """That `value` is an output of the model, or of one of its towers."""
    name = next(name for name, output in graph.returned if output == value)
    if value in dict(graph.towers).values():
        return Stop(-1, f"it is an output of a part that is traced on its own ({name})")
    alone = len(set(graph.output_fields)) == 1
    remedy = "" if alone else "; if you do not need it, name those you need with --returns"
    return Stop(-1, f"it is an output of the model ({name}){remedy}")


def _scales(track: Track) -> bool:
    return isinstance(track.index, range) or any(i >= 0 for i in track.index)


class Step:
    """What one node does with the scalings of its inputs."""

    def __init__(
        self,
        graph: Graph,
        position: int,
        tracks: Mapping[int, Track],
        parts: bool,
        rearrange_only: bool,
    ) -> None:
        self.graph, self.position, self.tracks = graph, position, tracks
        self.node = graph.nodes[position]
        self.parts, self.rearrange_only = parts, rearrange_only
        self.contractions: list[Contraction] = []
        self.stops: list[Stop] = []

    def run(self) -> dict[int, Track]:
        """The tracks of the node's outputs; contractions and stops are noted on the way."""
        node = self.node
        scaled = [i for i, value in enumerate(node.inputs) if value in self.tracks]
        if node.op in INDEPENDENT:
            return {}
        if node.op in PRODUCTS:
            return self._product(scaled)
        if node.op in ("cat", "stack"):
            return self._join(scaled)
        if len(scaled) == 1 and (moved := self._move(scaled[0])) is not None:
            return moved
        if not self.rearrange_only:
            if node.op in ("mul", "div"):
                return self._multiply(scaled)
            if node.op in ("add", "sub"):
                return self._add(scaled)
            if node.op in _SUMS:
                return self._sum()
            if node.op == "neg":
                return self._elementwise(0)
            if node.op == "masked_fill" and scaled == [0] and node.argument("value") == 0:
                return self._elementwise(0)
        return self._stop()

    def _shape(self, value: int) -> Shape:
        return self.graph.values[value].shape

    def _track(self, operand: int) -> Track:
        return self.tracks[self.node.inputs[operand]]

    def _stop(self, reason: str | None = None) -> dict[int, Track]:
        unknown = reason is None and self._is_unknown()
        self.stops.append(Stop(self.position, reason or self._described(), unknown))
        return {}

    def _is_unknown(self) -> bool:
        op = self.node.op
        return op not in NONLINEAR and op not in ("norm", "add", "sub", "mul", "div")

    def _described(self) -> str:
        node = self.node
        where = self.graph.where(self.position)
        if node.op == "norm":
            return f"it is read by the norm {node.module}"
        if node.op in ("add", "sub") and all(value in self.tracks for value in node.inputs):
            return f"its features are mixed with each other in {where} (a rotary embedding)"
        if node.op in ("add", "sub"):
            return f"it is added to another activation in {where}, not multiplied by a weight"
        if node.op == "mul":
            return f"it is multiplied with another activation in {where}"
        return f"it goes through {node.op} in {where}, which does not pass a gain on"

    def _move(self, operand: int) -> dict[int, Track] | None:
        node = self.node
        value = node.inputs[operand]
        after = tuple(self._shape(output) for output in node.outputs)
        moved = move(node, operand, self._track(operand), self._shape(value), after)
        if moved is None:
            return None
        kept = {out: track for out, track in zip(node.outputs, moved, strict=True) if track}
        floats = all(self._is_floating(out) for out in kept)
        return kept if len(kept) == len(node.outputs) and floats else self._stop()

    def _is_floating(self, value: int) -> bool:
        return self.graph.values[value].dtype.startswith(("float", "bfloat"))

    def _join(self, scaled: list[int]) -> dict[int, Track]:
        node = self.node
        inputs = node.inputs
        tracks = [self.tracks.get(value) for value in inputs]
        known = self._track(scaled[0])
        if node.op == "stack":
            across = True
            track: Track | None = stacked(node, self._shape(inputs[0]), known)
        else:
            track = joined(node, [self._shape(value) for value in inputs], tracks)
            across = track is None or track is known
        whole = all(other == known for other in tracks)
        if track is None or (across and not whole and not self.parts):
            return self._stop(
                f"it is joined with another tensor in {self.graph.where(self.position)}"
            )
        return {node.outputs[0]: track}

    def _multiply(self, scaled: list[int]) -> dict[int, Track]:
        if len(scaled) == 2 or (self.node.op == "div" and scaled == [1]):
            return self._stop()
        if self.node.argument("rounding_mode") is not None:
            return self._stop()
        return self._elementwise(scaled[0])

    def _elementwise(self, operand: int) -> dict[int, Track]:
        """Elementwise with something unscaled: the axis counts from the right, sizes broadcast."""
        track = self._track(operand)
        before, after = self._shape(self.node.inputs[operand]), self._shape(self.node.outputs[0])
        axis = track.axis + len(after) - len(before)
        if after[axis] != before[track.axis]:
            return self._stop()
        return {self.node.outputs[0]: replace(track, axis=axis)}

    def _add(self, scaled: list[int]) -> dict[int, Track]:
        if len(scaled) < 2 or self._track(0) != self._track(1):
            return self._stop()
        if self._shape(self.node.inputs[0]) != self._shape(self.node.inputs[1]):
            return self._stop()
        return {self.node.outputs[0]: self._track(0)}

    def _sum(self) -> dict[int, Track]:
        node, track = self.node, self._track(0)
        rank = len(self._shape(node.inputs[0]))
        dims = node.argument("dim")
        if isinstance(dims, int):
            dims = (dims,)
        if not isinstance(dims, tuple) or not dims:
            return self._stop()
        summed = {dim % rank for dim in dims if isinstance(dim, int)}
        if track.axis in summed or not self._is_floating(node.outputs[0]):
            return self._stop()
        if node.op != "cumsum" and not node.argument("keepdim", False):
            track = replace(track, axis=track.axis - sum(dim < track.axis for dim in summed))
        return {node.outputs[0]: track}

    def _product(self, scaled: list[int]) -> dict[int, Track]:
        node = self.node
        names = PRODUCTS[node.op]
        operands = [_ref(node, name) for name in names]
        inputs = node.inputs
        if any(inputs[i] not in operands for i in scaled):
            return self._stop()  # the tensor that addmm and baddbmm add
        if operands[0] == operands[1] or len(scaled) > 1:
            return self._stop(f"it is multiplied with itself in {self.graph.where(self.position)}")
        side = operands.index(inputs[scaled[0]])
        value, other = operands[side], operands[1 - side]
        track = self._track(scaled[0])
        ranks = [len(self._shape(operand)) for operand in operands]
        summed = [ranks[0] - 1, max(ranks[1] - 2, 0)]
        if track.axis == summed[side]:
            self.contractions.append(
                Contraction(
                    node=self.position,
                    operand=value,
                    other=other,
                    other_axis=summed[1 - side],
                    track=track,
                )
            )
            return {}
        if self.rearrange_only or len(inputs) > 2:
            return self._stop()
        return {node.outputs[0]: track}


def _ref(node: Node, name: str) -> int:
    argument = node.argument(name)
    assert isinstance(argument, Ref)
    return argument.value


def identity(track: Track | None, size: int) -> bool:
    """Whether `track` runs through all coordinates 0 to `size` - 1 in order."""
    return track is not None and same(track.index, range(size))


def same(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two indices are equal, be they ranges or tuples."""
    if type(one) is type(other):
        return one is other or one == other
    return tuple(one) == tuple(other)
