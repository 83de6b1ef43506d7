"""Write docs/coverage.md: what the rewrites do to every type of transformers. Takes minutes.

python scripts/measure_coverage.py [NAME ...]    renews only the rows of those names
"""

from __future__ import annotations

import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "coverage")]


def main() -> None:
    import document
    import tiny

    lines = document.known_lines()
    try:
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
            for row in pool.map(_row, sys.argv[1:] or tiny.NAMES):
                lines[row.name] = document.line(row)
    finally:  # what was measured stays
        rows = (lines[name] for name in tiny.NAMES if name in lines)
        document.PAGE.write_text(document.page(rows))


def _row(name: str) -> Any:
    import torch
    import transformers
    from measure import measure

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        print(name, file=sys.stderr, flush=True)
        try:
            return measure(name, Path(folder))
        except Exception as error:
            raise RuntimeError(f"{name} is not covered") from error


if __name__ == "__main__":
    main()
