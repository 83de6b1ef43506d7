"""Rounding once: float64 to a stored dtype, to nearest, ties to even."""

from __future__ import annotations

import math

import torch

_BITS_BELOW_BFLOAT16 = 0xFF  # the last 8 of float32's 24: zero in a number of 16 bits or fewer
_BITS_BELOW_TIE = {torch.bfloat16: 0x7FFF, torch.float16: 0xFFF}  # of float32: zero in a tie
_BITS_BELOW_29 = (1 << 24) - 1  # of float64's 53: a factor without them times 24 bits is exact
_GROUP = 64


def round_once(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`exact` correctly rounded to `dtype`.

    torch converts float64 to a 16-bit dtype by way of float32, which rounds twice. That goes
    wrong only where the first rounding ends on a tie of the second, and those few are rounded
    to odd first.
    """
    if exact.dtype is not torch.float64 or dtype in (torch.float64, torch.float32):
        return exact.to(dtype)
    nearest = exact.to(torch.float32)
    rounded = nearest.to(dtype)
    ties = _possible_ties(nearest, _BITS_BELOW_TIE[dtype])
    rounded.view(-1)[ties] = _to_odd(exact.view(-1)[ties]).to(dtype)
    return rounded


def _possible_ties(numbers: torch.Tensor, below: int) -> torch.Tensor:
    """Where the bits `below` are all zero. Groups without any are passed over quickly.

    Overwrites `numbers`: one block less, and malloc keeps the rest mapped.
    """
    size = math.gcd(numbers.numel(), _GROUP)
    bits = numbers.view(torch.int32).bitwise_and_(below).view(-1, size)
    groups = (bits.amin(1) == 0).nonzero()
    return (groups * size + torch.arange(size))[bits[groups.squeeze(1)] == 0]


def _to_odd(exact: torch.Tensor) -> torch.Tensor:
    """float64 in float32, to the odd neighbour: rounding that again rounds `exact` once.

    (Boldo and Melquiond, 2008; float32 has more than two bits to spare over 16-bit formats.)
    """
    nearest = exact.to(torch.float32)
    back = nearest.to(torch.float64)
    inexact = (back != exact) & back.isfinite()
    beyond = inexact & (back.abs() > exact.abs())
    bits = nearest.view(torch.int32)
    return ((bits - beyond.to(torch.int32)) | inexact.to(torch.int32)).view(torch.float32)


def multiply(block: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`block` times `factor`, rounded once to the dtype of `block`, which is overwritten.

    `factor` has the dtype that `product_dtype` chose for it.
    """
    dtype = block.dtype
    wide = block.to(factor.dtype)
    twice = factor.dtype is torch.float64 and dtype is not torch.float64
    if twice and bool((factor.view(torch.int64) & _BITS_BELOW_29).any()):
        return round_once(_product_to_odd(wide, factor), dtype)
    return round_once(wide.mul_(factor), dtype)


def _product_to_odd(short: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """float64 products, the inexact ones rounded to odd. `short` has at most 24 bits.

    Their error is exact in float64, as the factor's halves times `short` are (Dekker, 1971).
    """
    product = short * factor
    high = (factor.view(torch.int64) & -(1 << 27)).view(torch.float64)
    rest = short * high - product + short * (factor - high)
    bits = product.view(torch.int64)
    inexact = (rest != 0) & product.isfinite() & (bits & 1 == 0)
    step = torch.where((rest > 0) == (product > 0), 1, -1)
    return (bits + torch.where(inexact, step, 0)).view(torch.float64)


def product_dtype(factor: torch.Tensor, stored: torch.dtype) -> torch.dtype:
    """The cheapest dtype in which `factor` (float64) times any `stored` number rounds once.

    Two numbers of one format multiply with a single rounding in that format. A 16-bit number
    has at most 11 significant bits, bfloat16 8, so that its product with a factor of at most
    13 or 16 bits is exact in float32's 24, if no bit of it lies below float32's smallest number.
    Anything else is computed in float64.
    """
    if torch.equal(factor.to(stored).to(torch.float64), factor):
        return stored
    single = factor.to(torch.float32)
    if stored is torch.bfloat16 and torch.equal(single.to(torch.float64), factor):
        short = single.view(torch.int32) & _BITS_BELOW_BFLOAT16 == 0
        coarse = (factor * 2.0**16).frac() == 0  # a bfloat16 is a multiple of 2**-133
        if bool((short & coarse).all()):
            return torch.float32
    return torch.float64
