"""Rounding once, against exact rational arithmetic: ties, subnormals, overflow, signs.

`nearest` is the oracle of `test_conversion.py` as well.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from normconvert.rewrite.rounding import multiply, product_dtype, round_once


@dataclass(frozen=True)
class Format:
    """`precision` significant bits; every number is a multiple of 2**lowest, below 2**beyond."""

    precision: int
    lowest: int
    beyond: int


FORMATS = {
    torch.float64: Format(53, -1074, 1024),
    torch.float32: Format(24, -149, 128),
    torch.bfloat16: Format(8, -133, 128),
    torch.float16: Format(11, -24, 16),
}
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def nearest(exact: Fraction, dtype: torch.dtype) -> float:
    """`exact` rounded once to `dtype`, half to even, beyond the range to infinity."""
    if not exact:
        return 0.0
    fmt = FORMATS[dtype]
    unit = max(_exponent(exact) - fmt.precision + 1, fmt.lowest)
    count = round(exact / Fraction(2) ** unit)  # of a Fraction: exact, half to even
    if abs(count) * Fraction(2) ** unit >= Fraction(2) ** fmt.beyond:
        return math.copysign(math.inf, exact)
    return math.copysign(math.ldexp(count, unit), exact)


def _exponent(exact: Fraction) -> int:
    """The exponent of the power of two at or below |exact|."""
    size = abs(exact)
    guess = size.numerator.bit_length() - size.denominator.bit_length()
    return guess if size >= Fraction(2) ** guess else guess - 1


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors hold the same numbers, signs of zeros included."""
    return left.dtype == right.dtype and torch.equal(
        left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
    )


def stored(dtype: torch.dtype) -> st.SearchStrategy[float]:
    """Any finite number of `dtype`, by its bits: subnormals are as likely as their patterns."""
    # A bfloat16 is the upper half of a float32.
    width, code = (16, "e") if dtype is torch.float16 else (32, "f")
    shift = 16 if dtype is torch.bfloat16 else 0

    def number(bits: int) -> float:
        found: float = struct.unpack(f"<{code}", (bits << shift).to_bytes(width // 8, "little"))[0]
        return found

    return st.integers(0, (1 << (width - shift)) - 1).map(number).filter(math.isfinite)


@st.composite
def near_tie(draw: st.DrawFn, dtype: torch.dtype) -> float:
    """Halfway between two neighbours of `dtype`, or next to halfway in float64."""
    fmt = FORMATS[dtype]
    unit = draw(st.integers(fmt.lowest, fmt.beyond - fmt.precision))
    low = 0 if unit == fmt.lowest else 1 << (fmt.precision - 1)
    count = draw(st.integers(low, (1 << fmt.precision) - 1))
    tie = math.ldexp(2 * count + 1, unit - 1)
    moved = draw(st.sampled_from([tie, math.nextafter(tie, math.inf), math.nextafter(tie, 0.0)]))
    return draw(st.sampled_from([moved, -moved]))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_round_once_is_nearest(dtype: torch.dtype, data: st.DataObject) -> None:
    around = st.one_of(
        near_tie(dtype), stored(dtype), st.floats(allow_nan=False, allow_infinity=False)
    )
    exact = data.draw(st.lists(around, min_size=1, max_size=8))
    rounded = round_once(torch.tensor(exact, dtype=torch.float64), dtype)
    expected = [nearest(Fraction(number), dtype) for number in exact]
    expected = [math.copysign(e, number) for e, number in zip(expected, exact, strict=True)]
    assert same_bits(rounded, torch.tensor(expected, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_round_once_keeps_what_is_not_a_number(dtype: torch.dtype) -> None:
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0], dtype=torch.float64)
    rounded = round_once(special, dtype)
    assert rounded[:2].tolist() == [math.inf, -math.inf]
    assert rounded[2].isnan()
    assert rounded[3:].signbit().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_round_once_where_two_roundings_go_wrong(dtype: torch.dtype) -> None:
    """The reason for rounding to odd: torch's own conversion fails this."""
    fmt = FORMATS[dtype]
    tie = 1 + 2.0**-fmt.precision
    above = torch.tensor([tie + 2.0**-40], dtype=torch.float64)
    assert float(above.to(dtype)) == 1.0
    assert float(round_once(above, dtype)) == 1 + 2.0 ** (1 - fmt.precision)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_round_once_on_every_number_and_every_tie(dtype: torch.dtype) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(dtype)
    numbers = numbers[numbers.isfinite()]
    assert same_bits(round_once(numbers.to(torch.float64), dtype), numbers)
    ascending = torch.unique(numbers.to(torch.float64))
    lower, upper = ascending[:-1], ascending[1:]
    ties = (lower + upper) / 2
    assert torch.equal(round_once(ties.nextafter(lower), dtype).to(torch.float64), lower)
    assert torch.equal(round_once(ties.nextafter(upper), dtype).to(torch.float64), upper)
    even = lower.to(dtype).view(torch.int16) % 2 == 0
    found = round_once(ties, dtype).to(torch.float64)
    assert torch.equal(found, torch.where(even, lower, upper))


def effective_gain(gain: torch.dtype, offset: float) -> st.SearchStrategy[float]:
    """What rewrite multiplies with: a stored number, or 1 plus one where float64 holds the sum."""
    usual = st.floats(2.0**-20, 4.0, width=32).map(lambda w: nearest(Fraction(w), gain))
    return (
        st.one_of(usual, stored(gain))
        .filter(lambda w: Fraction(w) + Fraction(offset) == Fraction(w + offset))
        .map(lambda w: w + offset)
    )


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("gain", NARROW, ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_product_in_its_dtype_rounds_once(
    dtype: torch.dtype, gain: torch.dtype, offset: float, data: st.DataObject
) -> None:
    # One factor decides the dtype for all, so few at a time.
    factor = data.draw(st.lists(effective_gain(gain, offset), min_size=1, max_size=3))
    weight = data.draw(st.lists(stored(dtype), min_size=6, max_size=6))
    pairs = [(w, f) for w in weight for f in factor]
    check_product([w for w, _ in pairs], [f for _, f in pairs], dtype)


def test_a_subnormal_product_rounds_once() -> None:
    """In float32 this one rounds to a tie of bfloat16, just above which it is."""
    check_product([9 * 2.0**-133], [36409 * 2.0**-17], torch.bfloat16)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_long_product_next_to_a_tie_rounds_once(dtype: torch.dtype, data: st.DataObject) -> None:
    """A factor of float64's 53 bits, as 1 + w has: in float64 the product may be the very tie."""
    tie = data.draw(near_tie(dtype))
    weight = data.draw(stored(dtype).filter(bool))
    factor = data.draw(st.sampled_from([-1.0, 0.0, 1.0])) * math.ulp(tie / weight) + tie / weight
    assume(math.isfinite(factor) and abs(factor) > 2.0**-500)
    check_product([weight], [factor], dtype)


def check_product(weight: list[float], factor: list[float], dtype: torch.dtype) -> None:
    """The product as rewrite computes it is the exact product, rounded once."""
    block = torch.tensor(weight, dtype=torch.float64).to(dtype)
    by = torch.tensor(factor, dtype=torch.float64)
    compute = product_dtype(by, dtype)
    assert compute in (dtype, torch.float32, torch.float64)
    expected = [
        math.copysign(nearest(Fraction(w) * Fraction(f), dtype), math.copysign(1.0, w) * f)
        if f
        else w * f
        for w, f in zip(block.tolist(), factor, strict=True)
    ]
    rounded = multiply(block, by.to(compute))
    assert same_bits(rounded, torch.tensor(expected, dtype=torch.float64).to(dtype))
