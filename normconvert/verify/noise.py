"""The yardstick: what rounding the weights once, anywhere within half a unit, does to a model.

A conversion rounds each weight that it changes to the stored dtype. No conversion can be
nearer to its original than that, so the floor is measured: the same tensors of the original
are perturbed at random by at most half a unit in the last place.

A weight of 0 is exact, and so is what a gain makes of it. Only what is added to it is rounded: a
bias of 0 becomes W b, and has the noise of that. (A mean is taken out of whole matrices, whose
zeros become minus the mean: at most a quarter of the variance of the others' noise, left out.)
"""

from __future__ import annotations

import torch

_PIECE = 2**15
"""Of how many weights noise is made at a time: what is computed of them stays in the cache."""

_EXPONENT = 0x7FF0_0000_0000_0000
"""The bits of a float64 that are left of the largest power of 2 in it."""


def perturbed(
    weight: torch.Tensor,
    stored: torch.dtype,
    generator: torch.Generator,
    became: torch.Tensor | None = None,
) -> torch.Tensor:
    """`weight` plus noise, uniform within half a unit in the last place of `stored`.

    Where it is 0, within that of `became`, of the same shape: none without it, or if that is 0.

    Where the weight's own dtype is no finer than `stored`, such noise would vanish in it; one
    weight in twelve then moves by a whole unit, which has the same variance.
    """
    found = torch.empty_like(weight, memory_format=torch.contiguous_format)
    rounded = weight if became is None else became
    pieces = (torch.split(each.reshape(-1), _PIECE) for each in (weight, rounded, found))
    for piece, number, place in zip(*pieces, strict=True):
        unit = unit_in_the_last_place(torch.where(piece == 0, number, piece), stored)
        place.copy_(_perturbed(piece, unit, stored, generator))
    return found


def _perturbed(
    weight: torch.Tensor, unit: torch.Tensor, stored: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    uniform = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
    if torch.finfo(weight.dtype).eps < torch.finfo(stored).eps:
        noise = (uniform - 0.5) * unit
    else:
        noise = ((uniform < 1 / 24).to(unit) - (uniform > 23 / 24).to(unit)) * unit
    return (weight.to(torch.float64) + noise).to(weight.dtype)


def unit_in_the_last_place(weight: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """The distance to the next number of the dtype `stored` at each weight, in float64.

    It is 0 at 0, and at infinity.
    """
    info = torch.finfo(stored)
    power = (weight.to(torch.float64).view(torch.int64) & _EXPONENT).view(torch.float64)
    unit = power.clamp(min=info.smallest_normal) * info.eps
    return unit.masked_fill_((weight == 0) | ~weight.isfinite(), 0.0)
