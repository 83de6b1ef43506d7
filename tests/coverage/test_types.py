"""Every type: converted exactly, or kept with a reason; never wrong, never a traceback."""

from __future__ import annotations

from pathlib import Path

import document
import pytest
import tiny
from measure import measure

pytestmark = pytest.mark.coverage

EXACT = 1e-12


@pytest.mark.parametrize("name", tiny.NAMES)
def test_exact_or_refused(name: str, tmp_path: Path) -> None:
    # The zoo's models are compared in test_conversion.py and test_layernorm.py.
    row = measure(name, tmp_path, compare=not tiny.of_the_zoo(name))
    assert row.error <= EXACT
    text = document.line(row)
    known = document.known_lines()[name]
    assert document.without_error(known) == document.without_error(text), (
        "docs/coverage.md is out of date: make coverage"
    )


def test_the_page_has_every_type_and_no_other() -> None:
    assert list(document.known_lines()) == list(tiny.NAMES)
    assert document.PAGE.read_text().startswith(document.HEAD)
