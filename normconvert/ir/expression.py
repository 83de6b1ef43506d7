"""Expressions: what an output tensor is, as a formula over tensors of the source.

They compose by nesting and are evaluated once, in one pass, and rounded once. `str` prints
them; `to_json` and `from_json` are exact inverses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the source, as stored."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Scale:
    """`of` with every slice along `axis` multiplied by the matching element of the vector `by`."""

    of: Expression
    axis: int
    by: Expression

    def __str__(self) -> str:
        return f"scale({self.of}, axis={self.axis}, by={self.by})"


@dataclass(frozen=True, slots=True)
class Plus:
    """`of` plus a number, elementwise: the gain 1 + w that some models store as w."""

    of: Expression
    number: float

    def __str__(self) -> str:
        return f"({self.of} + {self.number:g})"


@dataclass(frozen=True, slots=True)
class Divide:
    """`of` over `by`, elementwise; 0 / 0 is 0. Refused where `by` is 0 and `of` is not."""

    of: Expression
    by: Expression

    def __str__(self) -> str:
        return f"({self.of} / {self.by})"


@dataclass(frozen=True, slots=True)
class AddProduct:
    """The vector `of` plus the sum over `axis` of the matrix `matrix` times `vector`: c + W b."""

    of: Expression
    matrix: Expression
    axis: int
    vector: Expression

    def __str__(self) -> str:
        return f"({self.of} + product({self.matrix}, axis={self.axis}, with={self.vector}))"


@dataclass(frozen=True, slots=True)
class Spread:
    """The vector `of` rearranged: for each run (start, stop) its elements start to stop.

    A run (-1, n) stands for n times the number 1: positions that no element belongs to.
    """

    of: Expression
    runs: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        runs = ",".join(
            f"1x{stop}" if start < 0 else f"{start}:{stop}" for start, stop in self.runs
        )
        return f"{self.of}[{runs}]"


@dataclass(frozen=True, slots=True)
class Fill:
    """Every element is `value`; the shape is the edit's."""

    value: float

    def __str__(self) -> str:
        return f"fill({self.value:g})"


@dataclass(frozen=True, slots=True)
class Center:
    """`of` minus its mean over `axis`."""

    of: Expression
    axis: int

    def __str__(self) -> str:
        return f"center({self.of}, axis={self.axis})"


@dataclass(frozen=True, slots=True)
class DropLast:
    """`of` without the last slice along `axis`: a vector of mean zero is known by the others."""

    of: Expression
    axis: int

    def __str__(self) -> str:
        return f"drop_last({self.of}, axis={self.axis})"


@dataclass(frozen=True, slots=True)
class MinusLast:
    """`of` without the last slice along `axis`, which is subtracted from every other one.

    Its product with the first coordinates of a vector of mean zero is that of `of` with all.
    """

    of: Expression
    axis: int

    def __str__(self) -> str:
        return f"minus_last({self.of}, axis={self.axis})"


Expression: TypeAlias = (
    "Tensor | Scale | Plus | Divide | AddProduct | Spread | Fill | Center | DropLast | MinusLast"
)

_ANY = (Tensor, Scale, Plus, Divide, AddProduct, Spread, Fill, Center, DropLast, MinusLast)
_OPERATIONS: dict[str, type[Any]] = {
    "scale": Scale,
    "plus": Plus,
    "divide": Divide,
    "add_product": AddProduct,
    "spread": Spread,
    "fill": Fill,
    "center": Center,
    "drop_last": DropLast,
    "minus_last": MinusLast,
}
_FIELDS = {kind: tuple(field.name for field in fields(kind)) for kind in _ANY}
_NAMES = {operation: name for name, operation in _OPERATIONS.items()}


def children(expression: Expression) -> Iterator[Expression]:
    """The expressions directly inside `expression`."""
    for name in _FIELDS[type(expression)]:
        value = getattr(expression, name)
        if isinstance(value, _ANY):
            yield value


def walk(expression: Expression) -> Iterator[Expression]:
    """`expression` and everything inside it."""
    yield expression
    for child in children(expression):
        yield from walk(child)


def tensors(expression: Expression) -> set[str]:
    """The names of the source tensors that `expression` reads."""
    return {each.name for each in walk(expression) if isinstance(each, Tensor)}


def shape_of(expression: Expression, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of `expression`, if it says so; `shapes` are those of the source's tensors."""
    match expression:
        case Tensor(name):
            return shapes[name]
        case DropLast(of, axis) | MinusLast(of, axis):
            shape = list(shape_of(of, shapes))
            shape[axis] -= 1
            return tuple(shape)
        case Scale(of=of) | Plus(of=of) | Divide(of=of) | Center(of=of) | AddProduct(of=of):
            return shape_of(of, shapes)
    raise ValueError(f"the shape of {expression} is its edit's")


def to_json(expression: Expression) -> Any:
    """A tensor is its name, everything else a list: the operation's name, then its fields."""
    if isinstance(expression, Tensor):
        return expression.name
    return [
        _NAMES[type(expression)],
        *(_field_to_json(getattr(expression, name)) for name in _FIELDS[type(expression)]),
    ]


def from_json(data: Any) -> Expression:
    """The expression that `to_json` turned into `data`.

    Raises:
        ValueError: `data` is not such an expression.
    """
    match data:
        case str(name):
            return Tensor(name)
        case [str(operation), *values] if operation in _OPERATIONS:
            names = _FIELDS[_OPERATIONS[operation]]
            if len(names) == len(values):
                found = (_field_from_json(*pair) for pair in zip(names, values, strict=True))
                expression: Expression = _OPERATIONS[operation](*found)
                return expression
    raise ValueError(f"not an expression: {data!r}")


def spread(of: Expression, index: Sequence[int], size: int) -> Expression:
    """The vector `of`, of `size` elements, at `index` (-1: the number 1); itself if in order."""
    in_order = range(size)
    if index == (in_order if isinstance(index, range) else tuple(in_order)):
        return of
    runs: list[tuple[int, int]] = []
    for i in index:
        start, stop = runs[-1] if runs else (0, 0)
        if i < 0 and runs and start < 0:
            runs[-1] = (-1, stop + 1)
        elif i >= 0 and runs and start >= 0 and stop == i:
            runs[-1] = (start, stop + 1)
        else:
            runs.append((i, i + 1) if i >= 0 else (-1, 1))
    return Spread(of, tuple(runs))


def positions(runs: tuple[tuple[int, int], ...]) -> list[int]:
    """The index that `runs` stand for, -1 where there is no element."""
    return list(
        chain.from_iterable(
            [-1] * stop if start < 0 else range(start, stop) for start, stop in runs
        )
    )


def _field_to_json(value: Any) -> Any:
    if isinstance(value, _ANY):
        return to_json(value)
    return [list(run) for run in value] if isinstance(value, tuple) else value


def _field_from_json(name: str, value: Any) -> Any:
    match name, value:
        case "axis", int():
            return value
        case "number" | "value", int() | float():
            return value
        case "runs", list() if all(isinstance(run, list) and len(run) == 2 for run in value):
            return tuple((int(start), int(stop)) for start, stop in value)
        case "axis" | "number" | "value" | "runs", _:
            raise ValueError(f"{name} cannot be {value!r}")
    return from_json(value)
