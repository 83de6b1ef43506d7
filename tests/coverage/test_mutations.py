"""That comparing the outputs catches wrong conversions; `make mutations` does so for every type."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutations import mutations

pytestmark = pytest.mark.coverage


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "ViTForImageClassification"])
def test_caught(name: str, tmp_path: Path) -> None:
    found = mutations(name, tmp_path)
    assert {each.kind for each in found} == {"edit left out", "element moved"}
    assert any(each.felt for each in found)
    assert all(each.caught == each.felt for each in found)
