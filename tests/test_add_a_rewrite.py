"""The rewrite of docs/add-a-rewrite.md, out of the page: it plans, converts and verifies."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from normconvert import planner, settle

PAGE = Path(__file__).parents[1] / "docs" / "add-a-rewrite.md"
RULE, IN_RULES, IN_REWRITES, TEST = re.findall(
    r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
)


def module(name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, found)
    exec(compile(code, f"{PAGE}: {name}", "exec"), vars(found))
    return found


@pytest.fixture
def tests(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The page's tests, with its rule in the planner."""
    rule = module("normconvert.rules.unbias", RULE, monkeypatch)
    (entry,) = eval(f"{{{IN_RULES}}}", vars(rule)).items()
    rules = list(planner.RULES.items())
    rules.insert([name for name, _ in rules].index("flashnorm"), entry)
    monkeypatch.setattr(planner, "RULES", dict(rules))
    rewrites = {**planner.REWRITES, **eval(f"{{{IN_REWRITES}}}")}
    monkeypatch.setattr(planner, "REWRITES", rewrites)
    monkeypatch.setattr(settle, "REWRITES", rewrites)
    monkeypatch.setitem(settle._DONE, "unbias", "freed of its bias")
    return module("test_unbias", TEST, monkeypatch)


def names(test: str) -> list[str]:
    """The models that the page names for its test."""
    found = re.search(rf'"name", (\[[^]]*\])\)\ndef {test}\(', TEST)
    assert found is not None
    return list(eval(found[1]))


@pytest.mark.parametrize("name", names("test_unbias"))
def test_it_moves_biases(name: str, tests: Any, tmp_path: Path) -> None:
    tests.test_unbias(name, tmp_path)


@pytest.mark.parametrize("name", names("test_unbias_says_why_not"))
def test_it_says_why_not(name: str, tests: Any, tmp_path: Path) -> None:
    tests.test_unbias_says_why_not(name, tmp_path)
