"""docs/formats.md explains every key that is written, and no other."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from command_line import run_here
from normconvert.ir import expression
from normconvert.ir.native import FullWidth, Native, NormModule, Recentering
from normconvert.ir.plan import SCHEMA_VERSION, Edit, Plan, Verdict
from normconvert.ir.report import Conversion, Inspection
from normconvert.settle import Request

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
CLASSES = {
    "config.json: normconvert": Native,
    "config.json: norms": NormModule,
    "config.json: recenterings": Recentering,
    "config.json: full_width": FullWidth,
    "normconvert.json: options": Request,
    "normconvert.json: plan": Plan,
    "normconvert.json: verdicts": Verdict,
    "normconvert.json: edits": Edit,
}


def keys(heading: str) -> set[str]:
    """The keys in the first table below a heading."""
    section = re.split(r"^#", PAGE.partition(f"# {heading}\n")[2], flags=re.MULTILINE)[0]
    table = section.partition("|---")[2].partition("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines()[1:]]
    return {key for cell in cells for key in re.findall(r"`([^`]+)`", cell)}


@pytest.mark.parametrize("heading", CLASSES)
def test_every_field_is_explained(heading: str) -> None:
    assert keys(heading) == {field.name for field in fields(CLASSES[heading])}


def test_every_operation_is_explained() -> None:
    for name, operation in expression._OPERATIONS.items():
        operands = ", ".join(field.name for field in fields(operation))
        assert f"| `{name}` | {operands} |" in PAGE
    assert PAGE.count("| of, ") + PAGE.count("| value |") == len(expression._OPERATIONS)


def test_the_files_have_the_keys_of_the_page(tmp_path: Path) -> None:
    source = ROOT / "models" / "tiny-gpt2"
    result = run_here("rmsnorm", source, "-o", "out", "--no-verify", "--json", cwd=tmp_path)
    assert result.status == 0, result
    document = result.json()
    assert document.keys() == {field.name for field in fields(Conversion)}
    assert document["inspection"].keys() == {field.name for field in fields(Inspection)}
    manifest = load(tmp_path / "out" / "normconvert.json")
    assert manifest.keys() == keys("normconvert.json") - {"verification"}
    assert manifest["plan"]["schema_version"] == SCHEMA_VERSION
    assert f"`plan.schema_version` is {SCHEMA_VERSION}" in PAGE.replace("\n", " ")
    config, before = load(tmp_path / "out" / "config.json"), load(source / "config.json")
    changed = {key for key, value in config.items() if key not in before or before[key] != value}
    assert changed == keys("config.json")
    assert manifest["plan"]["native"] == {
        k: v for k, v in config["normconvert"].items() if k != "stock"
    }


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
