"""Every type: converted exactly, or kept with a reason; never wrong, never a traceback."""

from __future__ import annotations

from pathlib import Path

import document
import pytest
import tiny
import transformers
from measure import measure

import zoo

pytestmark = pytest.mark.coverage

EXACT = 1e-12


@pytest.mark.parametrize("name", tiny.NAMES)
def test_exact_or_refused(name: str, tmp_path: Path) -> None:
    # The zoo's models are compared in test_conversion.py and test_layernorm.py.
    row = measure(name, tmp_path, compare=not tiny.of_the_zoo(name))
    assert row.error <= EXACT
    text, known = document.line(row), document.known_lines().get(name)
    if document.is_of_this_release():
        assert known is not None
        assert document.without_error(known) == document.without_error(text), (
            "docs/coverage.md is out of date: make coverage"
        )
    elif known is not None:
        assert row.model or "not traced" in known, text


@pytest.mark.skipif(
    not document.is_of_this_release(),
    reason=f"docs/coverage.md was not made with transformers {transformers.__version__}",
)
def test_the_page_has_every_type_and_no_other() -> None:
    assert list(document.known_lines()) == list(tiny.NAMES)
    assert document.PAGE.read_text().startswith(document.HEAD)


@pytest.mark.parametrize("name", [*tiny.VARIANTS, "llama", "OpenELMForCausalLM", "ViTModel"])
def test_no_gain_is_neutral(name: str) -> None:
    """Or a fold that does nothing would pass."""
    norms = [module for module in tiny.build(name).modules() if zoo.is_norm(module)]
    gains = [(module, module.weight) for module in norms if hasattr(module, "weight")]
    biases = [module.bias for module in norms if getattr(module, "bias", None) is not None]
    assert gains
    assert all(bool((gain != zoo.identity_gain(norm)).all()) for norm, gain in gains)
    assert all(bool((bias != 0).all()) for bias in biases)
