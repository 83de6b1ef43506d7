"""That right conversions pass and wrong ones do not; `make mutations` tries it with every type."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mutations import judge

pytestmark = pytest.mark.coverage

FELT = 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "ernie4_5_moe", "ViTForImageClassification"])
def test_right_and_wrong(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    found = list(judge(name, dtype, tmp_path, compare_wrong=True))
    exact, wrong = (
        [each for each in found if (each.kind == "exact") is it] for it in (True, False)
    )
    assert len(wrong) == 2 * len(exact) > 0
    assert all(each.certificate and each.outputs and each.effect == 0 for each in exact)
    effects = [each.effect or 0.0 for each in wrong]
    assert any(effect > FELT for effect in effects)
    assert [each.outputs for each in wrong] == [effect <= FELT for effect in effects]
    assert not any(each.certificate for each in wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_the_certificate_sees_what_rounding_hides(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    found = list(judge("llama", dtype, tmp_path, compare_wrong=False))
    assert [(each.kind == "exact", each.certificate) for each in found] == [
        (True, True),
        (False, False),
        (False, False),
    ]
    assert found[0].outputs
