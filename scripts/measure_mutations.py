"""Print how many wrong conversions comparing the outputs catches. Takes minutes."""

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
    import tiny

    names = sys.argv[1:] or tiny.NAMES
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        report([each for found in pool.map(mutated, names) for each in found])


def mutated(name: str) -> Any:
    """The mutations of one model, in a process of the pool."""
    import torch
    import transformers
    from mutations import mutations

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        print(name, file=sys.stderr, flush=True)
        try:
            return mutations(name, Path(folder))
        except Exception as error:
            raise RuntimeError(f"{name} cannot be mutated") from error


def report(found: list[Any]) -> None:
    """Name those that are missed; print the figure."""
    felt = [each for each in found if each.felt]
    caught = [each for each in felt if each.caught]
    for each in felt:
        if not each.caught:
            print(f"missed: {each.name}: {each.kind}: {each.tensor}")
    print(f"{len(found)} mutations of {len({each.name for each in found})} models;")
    print(f"{len(felt)} change the outputs, {len(caught)} of them are caught", end="")
    print(f" ({len(caught) / len(felt):.1%})." if felt else ".")


if __name__ == "__main__":
    main()
