"""Print how many wrong conversions the certificate and comparing the outputs catch.

python scripts/measure_mutations.py [--dtype float64] [NAME ...]    takes half an hour for all
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "coverage")]


def main() -> None:
    import tiny

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", default="float64", choices=("float64", "float32", "bfloat16"))
    parser.add_argument("names", nargs="*", default=tiny.NAMES, metavar="NAME")
    options = parser.parse_args()
    mutate = partial(mutated, dtype=options.dtype)
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        report([each for found in pool.map(mutate, options.names) for each in found])


def mutated(name: str, dtype: str) -> Any:
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
            return mutations(name, Path(folder), getattr(torch, dtype))
        except Exception as error:
            raise RuntimeError(f"{name} cannot be mutated") from error


def report(found: list[Any]) -> None:
    """Name those that are missed; print the figure."""
    felt = [each for each in found if each.felt]
    print(f"{len(found)} mutations of {len({each.name for each in found})} models")
    summary("the certificate catches", found, [each for each in found if each.certificate])
    summary(
        "comparing the outputs catches, of those that change them,",
        felt,
        [each for each in felt if each.outputs],
    )


def summary(what: str, all_of: list[Any], caught: list[Any]) -> None:
    """What is missed, by name, and the share of what is caught."""
    for each in all_of:
        if each not in caught:
            print(f"missed: {each.name}: {each.kind}: {each.tensor}")
    if all_of:
        share = len(caught) / len(all_of)
        print(f"{what} {len(caught)} of {len(all_of)} ({share:.1%})")


if __name__ == "__main__":
    main()
