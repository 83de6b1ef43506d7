"""docs/coverage.md: one row for every model of the coverage suite."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import transformers
from measure import Row

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
RELEASE = f"transformers {transformers.__version__},"
HEAD = f"""# Coverage

Every causal type of {RELEASE} variants of them, and other models,
each as a tiny random model: saved, converted with `flashnorm`, `rmsnorm` and `crmsnorm`, loaded
again and compared in float64. Made by `make coverage`; `tests/coverage` fails where it is out of
date.

The error is the largest difference of any output, relative to the largest output, over the three
rewrites. Norms are named by what they compute (w: a gain, 1+w: a gain stored less 1, b: a bias).
Tied embeddings are kept as they are. A hyphen: the model has no LayerNorm.

"""
TITLES = ("Type", "Model", "Norms", "Folded", "RMSNorm", "CRMSNorm", "Kept, and why", "Error")


def line(row: Row) -> str:
    """A row of the table."""
    return _table_line([*row.cells(), f"{row.error:.0e}" if row.model else ""])


def without_error(text: str) -> str:
    """A row without its last cell, which no two machines have alike."""
    return text.rstrip("| \n").rpartition("|")[0].rstrip()


def known_lines() -> dict[str, str]:
    """The rows that the page has, by the name in their first cell."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    return {line.split("|")[1].strip(): line for line in lines}


def is_of_this_release() -> bool:
    """Whether the page was made with the transformers that is installed here.

    Other releases have other types, and the same types with other modules.
    """
    return RELEASE in PAGE.read_text(encoding="utf-8")


def page(lines: Iterable[str]) -> str:
    """The whole page, of its rows."""
    head = [_table_line(TITLES), _table_line(["---"] * len(TITLES))]
    return HEAD + "\n".join([*head, *lines]) + "\n"


def _table_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
