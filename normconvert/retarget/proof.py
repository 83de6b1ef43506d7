"""The proof that two graphs are the same computation in exact arithmetic: value numbering.

Every value gets a number, by its operation and the numbers of what that reads; leaves by the
tensor's name on disk, constants by what they hold. Values of both graphs that share a number are
equal. What does not change a value (a cast between floating dtypes, a view of the same shape, a
product with 1) has no number of its own; what is not understood has one that nothing else gets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from normconvert.ir.graph import Argument, Graph, Node, Norm, Ref

Key: TypeAlias = "tuple[Any, ...]"
"""The kind of a value, then all that it is made of; a `Ref` is another value's number."""

_ALIASES = frozenset({"detach", "alias", "clone", "contiguous", "lift_fresh", "lift_fresh_copy"})
_RESHAPES = frozenset({"view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten"})
_COMMUTATIVE = frozenset({"add", "mul"})
_NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1}
_IRRELEVANT = frozenset({
    "device", "pin_memory", "layout", "memory_format", "non_blocking", "padding_idx",
})  # fmt: skip
_UNKNOWN = re.compile(
    r"overwritten|alias_of_unknown_layout|.*\.out|.*empty.*"
    r"|.*rand.*|.*dropout.*|.*bernoulli.*|.*normal.*|.*uniform.*|multinomial"
)
_BY_DATA = frozenset({"nonzero", "_local_scalar_dense", "equal", "is_nonzero"})
_SYMBOL = re.compile(r"\b(s|u|zf|zuf)\d+\b")
_DIGITS = 13


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two models. `constants` are its constants' keys, where they are known.

    `centered` are the LayerNorms, by path, whose input has mean zero; `ones` the gains, by the
    tensor's name, that will be stored as their identity; `zeros` the biases that will be 0.
    """

    graph: Graph
    constants: Mapping[int, Key]
    centered: frozenset[str] = frozenset()
    ones: frozenset[str] = frozenset()
    zeros: frozenset[str] = frozenset()


def needed(nodes: Sequence[Node], outputs: Iterable[int]) -> set[int]:
    """The values that `outputs` depend on, and themselves."""
    found = set(outputs)
    for node in reversed(nodes):
        if not found.isdisjoint(node.outputs):
            found.update(node.inputs)
    return found


def difference(source: Side, target: Side) -> str | None:
    """The first place where the two compute something else; None if they do nowhere."""
    for side in (source, target):
        decides = next((node for node in side.graph.nodes if node.op in _BY_DATA), None)
        if decides is not None:
            return f"{decides.module or side.graph.model} decides by its data what it computes"
    numbers = _Numbers()
    mine, other = _Numbered(source, numbers), _Numbered(target, numbers)
    left, right = dict(source.graph.returned), dict(target.graph.returned)
    if left.keys() != right.keys():
        return f"the outputs are {', '.join(left)} and {', '.join(right)}"
    for name, value in left.items():
        a, b = mine.of[value], other.of[right[name]]
        if a != b:
            a, b = numbers.parting(a, b)
            return f"it has {mine.describe(a)} where {target.graph.model} has {other.describe(b)}"
    return None


@dataclass(slots=True)
class _Numbers:
    """The numbers of both graphs: the key and the shape of every one."""

    keys: list[Key] = field(default_factory=list)
    shapes: list[tuple[Any, ...]] = field(default_factory=list)
    _known: dict[Key, int] = field(default_factory=dict)

    def number(self, key: Key, shape: tuple[Any, ...]) -> int:
        if key not in self._known:
            self._known[key] = len(self.keys)
            self.keys.append(key)
            self.shapes.append(shape)
        return self._known[key]

    def parting(self, a: int, b: int) -> tuple[int, int]:
        """Where the computations of `a` and `b`, which differ, part: as far back as possible."""
        while True:
            mine, other = _refs(self.keys[a]), _refs(self.keys[b])
            if self.keys[a][0] != self.keys[b][0] or len(mine) != len(other):
                return a, b
            if self.keys[a][0] in _COMMUTATIVE:
                shared = set(mine) & set(other)
                mine = [number for number in mine if number not in shared]
                other = [number for number in other if number not in shared]
            pairs = [pair for pair in zip(mine, other, strict=False) if pair[0] != pair[1]]
            if not pairs:
                return a, b
            a, b = pairs[0]


class _Numbered:
    """One side, numbered: `of` maps its values to numbers."""

    def __init__(self, side: Side, numbers: _Numbers) -> None:
        self._side, self._graph, self._numbers = side, side.graph, numbers
        self._modules: dict[int, str] = {}
        self.of: dict[int, int] = {}
        live = needed(self._graph.nodes, [value for _, value in self._graph.returned])
        for name, value in self._graph.leaves:
            self._set(value, ("tensor", name), "")
        for value in sorted(live - self._graph.producers.keys() - self.of.keys()):
            key = side.constants.get(value, ("unknown constant", len(numbers.keys)))
            self._set(value, key, self._reader(value))
        for node in self._graph.nodes:
            if not live.isdisjoint(node.outputs):
                self._number(node)

    def describe(self, number: int) -> str:
        """The value of a number, for people."""
        key = self._numbers.keys[number]
        where = f" in {self._modules[number] or self._graph.model}"
        match key[0]:
            case "tensor":
                return f"the tensor {key[1]!r}"
            case "input":
                return f"the input {key[1]}{where}"
            case "constant":
                return f"a table of {list(key[1])} numbers{where}"
            case "unknown constant":
                return f"a constant that is not known{where}"
            case "norm":
                gain = "a gain" if key[3] is not None else "no gain"
                bias = "a bias" if key[4] is not None else "no bias"
                return f"the {key[1]}{where} with epsilon {key[2]:g}, {gain} and {bias}"
            case "not understood":
                return f"{key[1]}, which is not followed,{where}"
            case "reshape":
                return f"a view as {list(key[2])}{where}"
        return f"{key[0]}{_plain_arguments(key)}{where}"

    def _reader(self, value: int) -> str:
        readers = self._graph.live_consumers.get(value)
        return self._graph.nodes[readers[0]].module if readers else ""

    def _set(self, value: int, key: Key, module: str) -> int:
        number = self._numbers.number(key, self._graph.values[value].shape)
        self._modules.setdefault(number, module)
        self.of[value] = number
        return number

    def _number(self, node: Node) -> None:
        same = self._same(node)
        if same is not None:
            self.of[node.outputs[0]] = same
            return
        key = self._key(node) or ("not understood", node.op, len(self._numbers.keys))
        if len(node.outputs) == 1:
            self._set(node.outputs[0], key, node.module)
            return
        whole = self._numbers.number(key, ())
        self._modules.setdefault(whole, node.module)
        for i, value in enumerate(node.outputs):
            self._set(value, ("output", i, Ref(whole)), node.module)

    def _same(self, node: Node) -> int | None:
        """The number of the input that the output of `node` is equal to, if it is."""
        if not node.inputs or len(node.outputs) != 1 or node.op == "norm":
            return None
        before, after = (self._graph.values[v] for v in (node.inputs[0], node.outputs[0]))
        number = self.of[node.inputs[0]]
        if node.op in _ALIASES:
            return number
        if node.op == "_to_copy":
            floats = "float" in before.dtype and "float" in after.dtype
            return number if floats or before.dtype == after.dtype else None
        if before != after or _symbolic(after.shape):
            return None
        if node.op in _RESHAPES or node.op in ("expand", "slice"):
            return number if node.argument("step", 1) == 1 else None
        neutral = node.op in _NEUTRAL and node.arguments[1:] == (("other", _NEUTRAL[node.op]),)
        return number if neutral else None

    def _key(self, node: Node) -> Key | None:
        """What the outputs of `node` are made of; None if it is not understood."""
        shape = self._graph.values[node.outputs[0]].shape
        if _UNKNOWN.fullmatch(node.op) or _symbolic(shape):
            return None
        if node.op == "norm":
            return self._norm_key(node, self._graph.norms_by_module[node.module])
        if node.op in _RESHAPES and node.argument("dtype") is None:
            return self._reshape_key(self.of[node.inputs[0]], shape)
        if node.op == "expand":
            return ("expand", Ref(self.of[node.inputs[0]]), shape)
        arguments = [
            (name, self._argument(node, name, argument))
            for name, argument in node.arguments
            if name not in _IRRELEVANT and argument is not None
        ]
        if _symbolic(arguments):
            return None
        if node.op in _COMMUTATIVE and len(arguments) == 2:
            operands = [argument for _, argument in arguments]
            if all(isinstance(operand, Ref) for operand in operands):
                return (node.op, *sorted(operands, key=lambda operand: operand.value))
        return (node.op, *arguments)

    def _reshape_key(self, number: int, shape: tuple[Any, ...]) -> Key:
        """A view of a view is one of the original."""
        key = self._numbers.keys[number]
        base = key[1].value if key[0] == "reshape" else number
        if self._numbers.shapes[base] == shape:
            return self._numbers.keys[base]
        return ("reshape", Ref(base), shape)

    def _norm_key(self, node: Node, norm: Norm) -> Key | None:
        if norm.kind == "unrecognised":
            return None
        kind = "rmsnorm" if norm.module in self._side.centered else norm.kind
        x, gain, bias = (node.argument(name) for name in ("input", "gain", "bias"))
        if not isinstance(x, Ref):
            return None
        return (
            "norm",
            kind,
            norm.eps,
            None if self._is_stored(gain, self._side.ones) else (self._ref(gain), norm.offset),
            None if self._is_stored(bias, self._side.zeros) else self._ref(bias),
            self._ref(x),
        )

    def _is_stored(self, vector: Argument, names: frozenset[str]) -> bool:
        if not isinstance(vector, Ref):
            return True
        key = self._numbers.keys[self.of[vector.value]]
        return key[0] == "tensor" and key[1] in names

    def _ref(self, argument: Argument) -> Ref | None:
        return Ref(self.of[argument.value]) if isinstance(argument, Ref) else None

    def _argument(self, node: Node, name: str, argument: Argument) -> Any:
        """`argument`, written in one way."""
        if isinstance(argument, tuple):
            return tuple(self._argument(node, name, item) for item in argument)
        if isinstance(argument, Ref):
            return self._ref(argument)
        if isinstance(argument, str):
            return "float" if argument.startswith(("torch.float", "torch.bfloat")) else argument
        if isinstance(argument, float):
            return float(f"{argument:.{_DIGITS}g}")
        shape = self._graph.values[node.inputs[0]].shape if node.inputs else ()
        if isinstance(argument, int) and name.startswith("dim") and node.op != "stack" and shape:
            return argument % len(shape)
        if node.op == "slice" and name == "end" and isinstance(argument, int):
            size = shape[int(str(node.argument("dim", 0)))]
            return min(argument, size) if isinstance(size, int) else argument
        return argument


def _refs(key: Any) -> list[int]:
    if isinstance(key, Ref):
        return [key.value]
    return [number for item in key for number in _refs(item)] if isinstance(key, tuple) else []


def _symbolic(value: Any) -> bool:
    """Whether a size that only the data determines is among these."""
    if isinstance(value, str):
        return _SYMBOL.search(value) is not None
    return isinstance(value, (tuple, list)) and any(_symbolic(item) for item in value)


def _plain_arguments(key: Key) -> str:
    """The numbers among the arguments of a key, in brackets, if there are any."""
    found = []
    for item in key[1:]:
        match item:
            case (str(name), int() | float() as number):
                found.append(f"{name}={number}")
    return f"({', '.join(found)})" if found else ""
