"""Rounding once: float64 to a stored dtype, to nearest, ties to even."""

from __future__ import annotations

import torch

_BITS_BELOW_BFLOAT16 = 0xFF  # the last 8 of float32's 24: zero in a number of 16 bits or fewer


def round_once(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`exact` (float64) correctly rounded to `dtype`.

    torch converts float64 to a 16-bit dtype by way of float32, which rounds twice. Rounding
    the first time to odd makes the second one right (Boldo and Melquiond, 2008): float32 has
    more than two bits to spare over both 16-bit formats.
    """
    if dtype in (torch.float64, torch.float32):
        return exact.to(dtype)
    nearest = exact.to(torch.float32)
    back = nearest.to(torch.float64)
    bits = nearest.view(torch.int32)
    inexact = (back != exact) & back.isfinite()
    beyond = inexact & (back.abs() > exact.abs())
    odd = (bits - beyond.to(torch.int32)) | inexact.to(torch.int32)
    return odd.view(torch.float32).to(dtype)


def product_dtype(factor: torch.Tensor, stored: torch.dtype) -> torch.dtype:
    """The cheapest dtype in which `factor` (float64) times any `stored` number rounds once.

    Two numbers of one format multiply with a single rounding in that format. A 16-bit number
    has at most 11 significant bits, bfloat16 8, so that its product with a factor of at most
    13 or 16 bits is exact in float32's 24. Anything else is computed in float64.
    """
    if torch.equal(factor.to(stored).to(torch.float64), factor):
        return stored
    single = factor.to(torch.float32)
    if stored is torch.bfloat16 and torch.equal(single.to(torch.float64), factor):
        short = single.view(torch.int32) & _BITS_BELOW_BFLOAT16 == 0
        if bool(short.all()):
            return torch.float32
    return torch.float64
