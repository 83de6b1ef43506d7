"""Where adding one number to every coordinate of a vector goes: the proof behind centering.

A LayerNorm does not see the mean of its input. So a value may be shifted, at every position by
another amount but along one axis by the same one, if every path from it ends in a LayerNorm over
that axis. The same steps read backwards say what a value is a sum of: if every summand has mean
zero along the axis, so has the value.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

from normconvert.ir.graph import Graph, Node, Ref
from normconvert.rules.axes import Shape, Track, move, stacked
from normconvert.rules.origins import Origins
from normconvert.rules.scaling import INDEPENDENT, NONLINEAR, PRODUCTS, Stop, output_stop, same


@dataclass(frozen=True, slots=True)
class Shift:
    """Along `axis` all elements of a value may move by the same amount.

    With `over`, a vector of the checkpoint, by that amount divided by the vector: such a shift
    becomes a plain one when the value is multiplied by it (LayerScale).
    """

    axis: int
    over: str | None = None


_ALONG_ALL_AXES = frozenset({"_to_copy", "alias", "clone", "detach", "expand"})
"""Operations that leave all axes where they are, seen from behind."""
_ZEROS = frozenset({"zeros", "zeros_like", "new_zeros"})
KNOWN = frozenset({
    *NONLINEAR, *INDEPENDENT, *PRODUCTS, *_ZEROS, "add", "cat", "convolution", "div", "gather",
    "index_add", "masked_scatter", "mean", "mul", "neg", "norm", "stack", "sub", "sum", "where",
})  # fmt: skip
"""Operations that are known to pass a shift on, or known not to."""


class Shifts:
    """How the nodes of `graph` pass shifts on."""

    def __init__(self, graph: Graph, origins: Origins) -> None:
        self._graph, self._origins = graph, origins

    def absorbs(self, position: int, operand: int, shift: Shift) -> bool:
        """Whether the node is a LayerNorm over just that axis of its input."""
        node = self._graph.nodes[position]
        rank = len(self._shape(node.inputs[operand]))
        return (
            node.op == "norm"
            and operand == 0
            and self._graph.norms_by_module[node.module].kind == "layernorm"
            and shift == Shift(rank - 1)
        )

    def through(self, position: int, operand: int, shift: Shift) -> dict[int, Shift] | None:
        """The shifts of the node's outputs that one of its input `operand` causes.

        None if the node does anything else with it.
        """
        node = self._graph.nodes[position]
        if node.op in INDEPENDENT:
            return {}
        if node.op in PRODUCTS:
            return self._product(node, operand, shift)
        if node.op == "convolution":
            return self._convolution(node, operand, shift)
        if node.op in ("cat", "stack"):
            return self._join(node, operand, shift)
        if node.op in ("add", "sub"):
            return self._elementwise(node, operand, shift)
        if node.op in ("mul", "div"):
            return self._multiply(node, operand, shift)
        if node.op == "where":
            return self._choose(node, operand, shift)
        if node.op == "neg":
            return {node.outputs[0]: shift}
        if node.op in ("sum", "mean"):
            return self._sum(node, shift)
        if node.op == "index_add":
            return self._index_add(node, operand, shift)
        if node.op == "masked_scatter":
            return self._fill_in(node, operand, shift)
        if node.op == "gather":  # takes each coordinate from another place
            return None
        return self._move(node, operand, shift)

    def summands(self, value: int, shift: Shift) -> dict[int, Shift] | None:
        """The inputs whose sum (times numbers that the axis does not know) `value` is.

        None if it is not such a sum: then nothing can be said about its mean.
        """
        position = self._graph.producers.get(value)
        if position is None:
            return None
        node = self._graph.nodes[position]
        if node.op in _ZEROS:
            return {}
        found: dict[int, Shift] = {}
        passing: set[int] = set()
        for operand, each in enumerate(node.inputs):
            for candidate in self._candidates(node, operand, value, shift):
                after = self.through(position, operand, candidate)
                if after is None or after.get(value) != shift:
                    continue
                if found.setdefault(each, candidate) != candidate:
                    return None
                passing.add(operand)
        return found if found and self._is_sum(node, passing) else None

    def _candidates(self, node: Node, operand: int, value: int, shift: Shift) -> list[Shift]:
        size = self._shape(value)[shift.axis]
        axes = [k for k, n in enumerate(self._shape(node.inputs[operand])) if n == size]
        overs = {shift.over}
        if node.op == "mul" and shift.over is None and len(node.inputs) == 2:
            overs.add(self._vector(node.inputs[1 - operand]))
        return [Shift(axis, over) for axis in axes for over in overs]

    def _is_sum(self, node: Node, passing: set[int]) -> bool:
        """Whether nothing is added but what passes the shift on."""
        if node.op in ("add", "sub", "cat", "stack"):
            tensors = node.op in ("cat", "stack") or isinstance(node.argument("other"), Ref)
            return tensors and len(passing) == len(node.inputs)
        if node.op == "where":
            return passing >= {1, 2}
        if node.op == "masked_scatter":
            return passing >= {0, 2}
        if node.op in ("addmm", "baddbmm"):
            return 0 in passing and len(passing) == 2
        if node.op == "convolution":
            return passing >= set(range(1, len(node.inputs)))
        if node.op == "index_add":
            names = ("self", "source")
            return passing >= {node.inputs.index(self._ref(node, name)) for name in names}
        return True

    def _ref(self, node: Node, name: str) -> int:
        argument = node.argument(name)
        assert isinstance(argument, Ref)
        return argument.value

    def _shape(self, value: int) -> Shape:
        return self._graph.values[value].shape

    def _vector(self, value: int) -> str | None:
        shape = self._shape(value)
        return self._origins.vector(value) if len(shape) == 1 else None

    def _move(self, node: Node, operand: int, shift: Shift) -> dict[int, Shift] | None:
        before = self._shape(node.inputs[operand])
        size = before[shift.axis]
        if not isinstance(size, int):
            return None
        after = tuple(self._shape(output) for output in node.outputs)
        moved = move(node, operand, Track(shift.axis, range(size)), before, after)
        if moved is None:
            return None
        found: dict[int, Shift] = {}
        for output, track in zip(node.outputs, moved, strict=True):
            if track is None or not same(track.index, range(size)) or not self._floating(output):
                return None
            found[output] = replace(shift, axis=track.axis)
        return found

    def _floating(self, value: int) -> bool:
        return self._graph.values[value].dtype.startswith(("float", "bfloat"))

    def _elementwise(self, node: Node, operand: int, shift: Shift) -> dict[int, Shift] | None:
        before, after = self._shape(node.inputs[operand]), self._shape(node.outputs[0])
        axis = shift.axis + len(after) - len(before)
        if after[axis] != before[shift.axis] or not self._floating(node.outputs[0]):
            return None
        return {node.outputs[0]: replace(shift, axis=axis)}

    def _multiply(self, node: Node, operand: int, shift: Shift) -> dict[int, Shift] | None:
        if node.op == "div" and (operand > 0 or node.argument("rounding_mode") is not None):
            return None
        passed = self._elementwise(node, operand, shift)
        if passed is None or len(node.inputs) == 1:
            return passed
        (output, after), other = next(iter(passed.items())), node.inputs[1 - operand]
        shape = self._shape(other)
        axis = after.axis - len(self._shape(output)) + len(shape)
        if axis < 0 or shape[axis] == 1:
            return passed
        if node.op == "mul" and shift.over is not None and self._vector(other) == shift.over:
            return (
                {output: Shift(after.axis)} if after.axis == len(self._shape(output)) - 1 else None
            )
        return None

    def _choose(self, node: Node, operand: int, shift: Shift) -> dict[int, Shift] | None:
        """`where` takes all coordinates from one of two, if its condition has none."""
        passed = self._elementwise(node, operand, shift)
        if operand == 0 or passed is None or len(node.inputs) < 3:
            return None
        (output, after) = next(iter(passed.items()))
        behind = len(self._shape(output)) - after.axis
        return passed if self._is_constant(node.inputs[0], behind) else None

    def _fill_in(self, node: Node, operand: int, shift: Shift) -> dict[int, Shift] | None:
        """`masked_scatter` puts what it is given, one element after the other, in place of others.

        Whole rows of one in place of rows of the other, if both have the same last axis and the
        mask has none.
        """
        value, (output,) = node.inputs[operand], node.outputs
        before, after = self._shape(value), self._shape(output)
        last = shift.axis == len(before) - 1 and before[-1] == after[-1]
        if operand == 1 or not last or not self._is_constant(node.inputs[1], 1):
            return None
        return {output: replace(shift, axis=len(after) - 1)}

    def _is_constant(self, value: int, behind: int) -> bool:
        """Whether `value` is the same along the axis that is so far from behind."""
        while True:
            shape = self._shape(value)
            if len(shape) < behind or shape[-behind] == 1:
                return True
            position = self._graph.producers.get(value)
            if position is None:
                return False
            node = self._graph.nodes[position]
            if node.op not in _ALONG_ALL_AXES:
                return False
            value = node.inputs[0]

    def _sum(self, node: Node, shift: Shift) -> dict[int, Shift] | None:
        rank = len(self._shape(node.inputs[0]))
        dims = node.argument("dim")
        dims = (dims,) if isinstance(dims, int) else dims
        if not isinstance(dims, tuple) or not dims or not self._floating(node.outputs[0]):
            return None
        summed = {dim % rank for dim in dims if isinstance(dim, int)}
        if shift.axis in summed:
            return None
        if node.argument("keepdim", False):
            return {node.outputs[0]: shift}
        axis = shift.axis - sum(dim < shift.axis for dim in summed)
        return {node.outputs[0]: replace(shift, axis=axis)}

    def _join(self, node: Node, operand: int, shift: Shift) -> dict[int, Shift] | None:
        shape = self._shape(node.inputs[operand])
        dim = node.argument("dim", 0)
        assert isinstance(dim, int)
        if node.op == "stack":
            axis = stacked(node, shape, Track(shift.axis, range(0))).axis
            return {node.outputs[0]: replace(shift, axis=axis)}
        return None if dim % len(shape) == shift.axis else {node.outputs[0]: shift}

    def _product(self, node: Node, operand: int, shift: Shift) -> dict[int, Shift] | None:
        """A product passes a shift of either factor on along the axis that it does not sum."""
        value = node.inputs[operand]
        factors = [node.argument(name) for name in PRODUCTS[node.op]]
        if factors[0] == factors[1]:
            return None
        if Ref(value) not in factors:
            return self._elementwise(node, operand, shift)  # what addmm and baddbmm add
        if any(Ref(value) == added for name, added in node.arguments if name == "self") and (
            "self" not in PRODUCTS[node.op]
        ):
            return None  # a factor that is added as well
        second = factors.index(Ref(value))
        rank = len(self._shape(value))
        kept = rank - 1 if second else rank - 2
        if rank < 2 or shift.axis != kept:  # the axis that is summed, or one of a batch
            return None
        after = len(self._shape(node.outputs[0]))
        axis = after - 1 if second or node.op == "mv" else after - 2
        return {node.outputs[0]: replace(shift, axis=axis)}

    def _index_add(self, node: Node, operand: int, shift: Shift) -> dict[int, Shift] | None:
        """Adds rows of `source` to rows of `self`: both pass a shift along another axis on."""
        value = node.inputs[operand]
        if value not in (self._ref(node, "self"), self._ref(node, "source")):
            return None
        dim = node.argument("dim")
        assert isinstance(dim, int)
        same_axis = dim % len(self._shape(value)) == shift.axis
        return None if same_axis else {node.outputs[0]: shift}

    def _convolution(self, node: Node, operand: int, shift: Shift) -> dict[int, Shift] | None:
        """A shift of the weight or the bias along the output channels."""
        if operand == 0 or shift.axis != 0 or node.argument("transposed", False):
            return None
        return {node.outputs[0]: replace(shift, axis=1)}


def obstacles(
    graph: Graph, shifts: Shifts, seeds: Mapping[int, Shift], *, cut: Set[int] = frozenset()
) -> dict[tuple[int, Shift], Stop | None]:
    """For every shift that `seeds` cause, the seeds included, the first place that minds it.

    None where all paths end in LayerNorms, or nowhere. Paths through the values `cut` are left out.
    """
    outputs = {value for _, value in graph.returned}
    after: dict[tuple[int, Shift], list[tuple[int, Shift]]] = {}
    found: dict[tuple[int, Shift], Stop | None] = {}
    waiting = list(seeds.items())
    while waiting:
        state = waiting.pop()
        if state in after:
            continue
        value, shift = state
        after[state] = []
        found[state] = output_stop(graph, value) if value in outputs else None
        for position in graph.live_consumers.get(value, ()):
            for operand, each in enumerate(graph.nodes[position].inputs):
                if each != value or shifts.absorbs(position, operand, shift):
                    continue
                passed = shifts.through(position, operand, shift)
                if passed is None:
                    found[state] = found[state] or _stop(graph, position)
                    continue
                followed = [(out, moved) for out, moved in passed.items() if out not in cut]
                after[state] += followed
                waiting += followed
    order = sorted(after, key=lambda state: graph.producers.get(state[0], -1), reverse=True)
    for state in order:
        for following in after[state]:
            found[state] = found[state] or found[following]
    return found


def _stop(graph: Graph, position: int) -> Stop:
    node = graph.nodes[position]
    where = graph.where(position)
    if node.op == "norm":
        return Stop(position, f"it is read by {where}, which is no LayerNorm over its features")
    if node.op in PRODUCTS:
        return Stop(position, f"it is read by {where} without a LayerNorm in between")
    reason = f"it goes through {node.op} in {where}, which sees its mean"
    return Stop(position, reason, node.op not in KNOWN)
