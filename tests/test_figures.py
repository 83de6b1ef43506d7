"""The figures of a comparison: what they are of logits that are hardly apart, and of no numbers."""

from __future__ import annotations

import math

import pytest
import torch

from normconvert.ir.report import Comparison
from normconvert.verify.figures import comparison


def compared(one: torch.Tensor, other: torch.Tensor) -> Comparison:
    return comparison("random", one, other, [(1.0, 1.0)], None)


@pytest.mark.parametrize("seed", range(8))
def test_a_divergence_is_never_negative(seed: int) -> None:
    """Of logits that differ in their last bits the sum may round to less than 0."""
    random = torch.Generator().manual_seed(seed)
    one, noise = (torch.randn(8, 50, generator=random, dtype=torch.float64) for _ in range(2))
    assert 0 <= compared(one, one + 1e-16 * noise).kl < 1e-15


def test_a_divergence_by_hand() -> None:
    one, other = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert compared(one, other).kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_what_is_no_number_stays_none() -> None:
    one = torch.zeros(2, 3)
    assert math.isnan(compared(one, one + math.nan).kl)
