"""What the tensors of a plan must be: a second evaluator, which shares nothing with the first.

It works on boxes of a tensor in float64 and knows how far each result can be from the exact one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from normconvert.ir.expression import (
    AddProduct,
    Center,
    Divide,
    DropLast,
    Expression,
    Fill,
    MinusLast,
    Plus,
    Scale,
    Spread,
    Tensor,
    positions,
    shape_of,
)
from normconvert.verify.stored import decode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from normconvert.verify.stored import Box, Stored

Array: TypeAlias = "npt.NDArray[np.float64]"

UNIT = 2.0**-53
"""The largest relative error of one operation in float64."""

BOX_ELEMENTS = 1 << 18
"""Elements that are computed at a time: what a core's cache holds in float64."""

STORED_BITS = {"BF16": 8, "F16": 11, "F32": 24, "F64": 53}
"""Significant bits of the dtypes that can be rewritten."""


@dataclass(frozen=True, slots=True)
class Enclosure:
    """Numbers known to within `slack`: the exact ones are at most so far from `value`.

    `bits` bounds the significant bits of the values; two with 53 together multiply exactly.
    `nearest` says that the values are the exact ones rounded once to float64.
    """

    value: Array
    slack: Array | float
    bits: int
    nearest: bool = True


class Recomputer:
    """Evaluates expressions over the tensors of a checkpoint."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._shapes = {name: tensor.shape for name, tensor in stored.tensors.items()}
        self.vector = lru_cache(maxsize=64)(self._vector)
        self._mean = lru_cache(maxsize=4)(self._whole_mean)

    def box(self, expression: Expression, shape: tuple[int, ...], box: Box) -> Enclosure:
        """The part `box` of `expression`, which has the shape `shape`."""
        match expression:
            case Tensor(name):
                dtype = self._stored.tensors[name].dtype
                value = decode(self._stored.box(name, box), dtype)
                return Enclosure(value, 0.0, STORED_BITS[dtype])
            case Fill(value):
                sizes = [each.stop - each.start for each in box]
                return Enclosure(np.full(sizes, value), 0.0, 53)
            case Scale(of, axis, by):
                factor = self.vector(by, shape[axis])
                return _times(self.box(of, shape, box), _along(factor, box, axis))
            case Center(of, axis):
                mean = self._mean(of, shape, axis)
                across = tuple(slice(0, 1) if i == axis else each for i, each in enumerate(box))
                return _plus(self.box(of, shape, box), _negative(_part(mean, across)))
            case DropLast(of, axis):
                return self.box(of, _longer(shape, axis), box)
            case MinusLast(of, axis):
                longer = _longer(shape, axis)
                last = slice(shape[axis], shape[axis] + 1)
                there = tuple(last if i == axis else each for i, each in enumerate(box))
                return _plus(self.box(of, longer, box), _negative(self.box(of, longer, there)))
        return _part(self.vector(expression, shape[0]), box)

    def _vector(self, expression: Expression, size: int) -> Enclosure:
        """The whole of a vector of `size` elements."""
        match expression:
            case Plus(of, number):
                return _plus(self.vector(of, size), Enclosure(np.array([number]), 0.0, 53))
            case Divide(of, by):
                return _over(self.vector(of, size), self.vector(by, size))
            case Spread(of, runs):
                index = np.array(positions(runs))
                whole = self.vector(of, int(index.max()) + 1)
                ones = index < 0
                if not isinstance(whole.slack, float):
                    slack = np.where(ones, 0.0, whole.slack[index])
                    return Enclosure(
                        np.where(ones, 1.0, whole.value[index]), slack, 53, whole.nearest
                    )
                return Enclosure(np.where(ones, 1.0, whole.value[index]), 0.0, whole.bits)
            case AddProduct(of, matrix, axis, vector):
                return _plus(self.vector(of, size), self._product(matrix, axis, vector))
        found = self.box(expression, (size,), (slice(0, size),))
        single = found.value.astype(np.float32)
        short = found.bits > 24 and bool((single.astype(np.float64) == found.value).all())
        return Enclosure(found.value, found.slack, 24 if short else found.bits, found.nearest)

    def _product(self, matrix: Expression, axis: int, vector: Expression) -> Enclosure:
        """The sum over `axis` of `matrix` times `vector`."""
        shape = shape_of(matrix, self._shapes)
        count = shape[axis]
        factor = self.vector(vector, count)
        total, size = np.zeros(shape[1 - axis]), np.zeros(shape[1 - axis])
        for box in boxes(shape):
            terms = _times(self.box(matrix, shape, box), _along(factor, box, axis))
            there = box[1 - axis]
            total[there] += terms.value.sum(axis)
            size[there] += (np.abs(terms.value) + terms.slack / (count * UNIT)).sum(axis)
        return Enclosure(total, (count + 1) * UNIT * size, 53, nearest=False)

    def _whole_mean(self, of: Expression, shape: tuple[int, ...], axis: int) -> Enclosure:
        """The mean over `axis`, which is kept as an axis of size 1."""
        count = shape[axis]
        reduced = tuple(1 if i == axis else size for i, size in enumerate(shape))
        total, size, lost = np.zeros(reduced), np.zeros(reduced), np.zeros(reduced)
        smallest = np.full(reduced, np.inf)  # bit of any of the numbers
        for box in boxes(shape):
            there = tuple(slice(0, 1) if i == axis else each for i, each in enumerate(box))
            part = self.box(of, shape, box)
            some, lost_here = _sum(part.value, axis)
            total[there], lost_there = _two_sum(total[there], some)
            lost[there] += lost_here + np.abs(lost_there)
            if not isinstance(part.slack, float):
                lost[there] += part.slack.sum(axis, keepdims=True)
            sizes = np.abs(part.value)
            size[there] += sizes.sum(axis, keepdims=True)
            bits = np.where(sizes > 0, sizes * 2.0**-part.bits, np.inf)
            smallest[there] = np.minimum(smallest[there], bits.min(axis, keepdims=True))
        # A sum of n numbers in any order is off by at most n units of the sum of their sizes; by
        # nothing, whatever the order, if float64 has all the bits between them.
        exact = (lost == 0) & (size < smallest * 2.0**53)
        slack = np.where(exact, 0.0, lost + count * UNIT * size) / count
        mean = total / count
        slack += np.where(_product_is(mean, count, total), 0.0, UNIT * np.abs(mean))
        return Enclosure(mean, slack, 53, nearest=False)


def boxes(shape: tuple[int, ...]) -> Iterator[Box]:
    """Boxes of about `BOX_ELEMENTS` elements that a tensor of `shape` consists of."""
    left, steps = BOX_ELEMENTS, []
    for size in reversed(shape):
        steps.append(max(1, min(size, left)))
        left //= max(1, size)
    ranges = [
        [slice(start, min(start + step, size)) for start in range(0, size, step)]
        for size, step in zip(shape, reversed(steps), strict=True)
    ]
    yield from itertools.product(*ranges)


def _longer(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], shape[axis] + 1, *shape[axis + 1 :])


def _along(vector: Enclosure, box: Box, axis: int) -> Enclosure:
    """The elements of `vector` that belong to the box, lying along `axis`."""
    shape = [-1 if i == axis else 1 for i in range(len(box))]
    part = _part(vector, (box[axis],))
    slack = part.slack if isinstance(part.slack, float) else part.slack.reshape(shape)
    return Enclosure(part.value.reshape(shape), slack, part.bits, part.nearest)


def _part(whole: Enclosure, box: Box) -> Enclosure:
    slack = whole.slack if isinstance(whole.slack, float) else whole.slack[box]
    return Enclosure(whole.value[box], slack, whole.bits, whole.nearest)


def _negative(a: Enclosure) -> Enclosure:
    return Enclosure(-a.value, a.slack, a.bits, a.nearest)


def _times(a: Enclosure, b: Enclosure) -> Enclosure:
    with np.errstate(invalid="ignore"):  # infinity times 0, of which no stored number is right
        value = a.value * b.value
    exact = a.bits + b.bits <= 53
    if exact and isinstance(a.slack, float) and isinstance(b.slack, float):
        return Enclosure(value, 0.0, a.bits + b.bits)
    slack = np.abs(a.value) * b.slack + np.abs(b.value) * a.slack + a.slack * b.slack
    lost = 0.0 if exact else np.abs(_lost(a.value, b.value, value))
    return Enclosure(value, slack + lost, 53, _are_exact(a, b))


def _plus(a: Enclosure, b: Enclosure) -> Enclosure:
    value, lost = _two_sum(a.value, b.value)
    slack = np.abs(lost) + a.slack + b.slack
    return Enclosure(value, slack if slack.any() else 0.0, 53, _are_exact(a, b))


def _over(a: Enclosure, b: Enclosure) -> Enclosure:
    divisor = np.where(b.value == 0, 1.0, b.value)
    value = np.where(b.value == 0, 0.0, a.value / divisor)
    slack = (a.slack + np.abs(value) * b.slack) / (np.abs(divisor) - b.slack)
    return Enclosure(value, slack + UNIT * np.abs(value), 53, _are_exact(a, b))


def _are_exact(*each: Enclosure) -> bool:
    return all(isinstance(one.slack, float) for one in each)


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The sum in float64 and what it lost, which is a float64 number itself (Knuth)."""
    value = a + b
    rest = value - a
    return value, (a - (value - rest)) + (b - rest)


def _lost(a: Array, b: Array, product: Array) -> Array:
    """The exact product less the rounded one (Dekker), or a bound where that overflows."""
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    with np.errstate(over="ignore", invalid="ignore"):
        lost = (a_high * b_high - product) + a_high * b_low + a_low * b_high + a_low * b_low
    return np.where(np.isfinite(lost), lost, UNIT * np.abs(product))


def _halves(number: Array) -> tuple[Array, Array]:
    """Two numbers of at most 26 bits each whose sum is `number` (Veltkamp)."""
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = number * (2.0**27 + 1)
        high = scaled - (scaled - number)
        return high, number - high


def _sum(value: Array, axis: int) -> tuple[Array, Array]:
    """The sum over `axis`, kept at size 1, and the sizes of all that was lost on the way."""
    value = np.moveaxis(value, axis, 0)
    lost = np.zeros_like(value[:1])
    while len(value) > 1:
        half = len(value) // 2
        sums, rest = _two_sum(value[:half], value[half : 2 * half])
        lost += np.abs(rest).sum(0, keepdims=True)
        value = np.concatenate([sums, value[2 * half :]])
    return np.moveaxis(value, 0, axis), np.moveaxis(lost, 0, axis)


def _product_is(factor: Array, count: int, product: Array) -> npt.NDArray[np.bool_]:
    """Where `factor` times `count`, of at most 24 bits, is `product` without any rounding."""
    high = factor.astype(np.float32).astype(np.float64)
    same: npt.NDArray[np.bool_] = (product - high * count) - (factor - high) * count == 0
    return same
