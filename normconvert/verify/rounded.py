"""Whether stored numbers are exact ones correctly rounded.

A number is rounded correctly if the exact one lies between the points halfway to its two
neighbours in the stored dtype; on such a point, if its last bit is 0 (ties to even). So nothing is
rounded to find out, except for short products of bfloat16, which most weights are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from normconvert.verify.stored import decode

if TYPE_CHECKING:
    import numpy.typing as npt

    from normconvert.verify.recompute import Array, Enclosure
    from normconvert.verify.stored import Raw

_INTEGER: dict[str, Any] = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}


def wrongly_rounded(raw: Raw, dtype: str, exact: Enclosure) -> tuple[npt.NDArray[np.bool_], int]:
    """Which of the stored numbers `raw` are not `exact` rounded, and how many nobody can tell.

    The latter lie so near to a tie that float64 does not decide it: both neighbours pass.
    """
    stored = decode(raw, dtype)
    slack = 2 * np.asarray(exact.slack)  # the other evaluation may be off the other way
    with np.errstate(invalid="ignore", over="ignore"):
        if dtype == "F64":
            distance = np.abs(stored - exact.value)
            close = distance <= (0.0 if exact.nearest else slack)
            right = close & _same_zero(stored, exact, slack)
            undecided = right & (distance > 0)
        else:
            right, undecided = _between(raw, dtype, stored, exact.value, slack)
    unusual = ~np.isfinite(stored) | ~np.isfinite(exact.value)
    same = (stored == exact.value) | (np.isnan(stored) & np.isnan(exact.value))
    return np.where(unusual, ~same, ~right), int((undecided & ~unusual).sum())


def _between(
    raw: Raw, dtype: str, stored: Array, exact: Array, slack: Array
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    integer = _INTEGER[dtype]
    magnitude = raw.view(integer) & integer(np.iinfo(integer).max >> 1)
    above = decode((magnitude + integer(1)).view(raw.dtype), dtype)
    below = np.where(
        magnitude == 0,
        -above,
        decode((magnitude - (magnitude > 0)).astype(integer).view(raw.dtype), dtype),
    )
    size = np.abs(stored)
    above = np.where(np.isinf(above), 2 * size - below, above)
    towards = np.where(np.signbit(stored), -exact, exact)
    low, high = (size + below) / 2, (size + above) / 2
    even = raw.view(integer) & integer(1) == 0
    decided = (towards - slack > low) & (towards + slack < high)
    tie = even & (slack == 0) & ((towards == low) | (towards == high))
    near = (slack > 0) & (towards + slack >= low) & (towards - slack <= high)
    sign = (exact != 0) | (slack > 0) | (np.signbit(exact) == np.signbit(stored))
    return (decided | tie | near) & sign, near & ~decided


def _same_zero(stored: Array, exact: Enclosure, slack: Array) -> npt.NDArray[np.bool_]:
    known = (exact.value == 0) & (slack == 0)
    same: npt.NDArray[np.bool_] = ~known | (np.signbit(stored) == np.signbit(exact.value))
    return same


def products_are_rounded(raw: Raw, weight: Raw, factor: npt.NDArray[np.float32]) -> bool:
    """The same for bfloat16, where `weight` times `factor` is exact in float32: all or not all.

    On the bits, where a carry into the upper half is what rounds to the nearest, and at a tie to
    the even one.
    """
    bits = weight.astype(np.uint32)
    bits <<= 16
    exact = bits.view(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        exact *= factor
    odd = bits >> 16
    odd &= 1
    odd += 0x7FFF
    bits += odd
    bits >>= 16
    return bool((bits == raw).all())
