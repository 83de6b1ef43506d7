"""That wrong conversions are caught; `make mutations` tries it with every type."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mutations import mutations

pytestmark = pytest.mark.coverage


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "ViTForImageClassification"])
def test_caught(name: str, tmp_path: Path) -> None:
    found = mutations(name, tmp_path, torch.float32)
    assert {each.kind for each in found} == {"edit left out", "element moved"}
    assert any(each.felt for each in found)
    assert all(each.outputs == each.felt for each in found)
    assert all(each.certificate for each in found)
