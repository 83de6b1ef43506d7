"""Print how often the verification is wrong: on exact conversions, and on wrong ones.

python scripts/measure_mutations.py [--results FILE] [--names NAME ...]

All models of the test suite are converted by every rewrite that applies, stored in four dtypes. The
certificate judges each conversion as it is, and with a fault; comparing the outputs as well, the
faults in the dtypes of --faults alone. For all it takes hours; with --results, what was found is
kept in that file, and what is in it is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "coverage")]

DTYPES = ("float64", "float32", "bfloat16", "float16")
FELT = 1e-12
"""Of the largest output; what changes the outputs by less is float64's own rounding."""


def main() -> None:
    import tiny

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--faults", nargs="*", default=("float64", "float32"), choices=DTYPES)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, help="keeps what was found, as lines of JSON")
    parser.add_argument("--names", nargs="+", default=tiny.NAMES, metavar="NAME")
    options = parser.parse_args()
    done = known(options.results)
    jobs = [
        (name, dtype, dtype in options.faults)
        for dtype in options.dtypes
        for name in options.names
        if (name, dtype) not in done
    ]
    failures = []
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        futures = {pool.submit(judged, *job): job for job in jobs}
        for future in as_completed(futures):
            name, dtype, _ = futures[future]
            try:
                done[name, dtype] = future.result()
            except RuntimeError as error:  # the others' hours are not to be lost
                failures.append(f"{error}: {error.__cause__}")
                print(failures[-1], file=sys.stderr, flush=True)
                continue
            if options.results:
                with options.results.open("a") as file:
                    file.write(json.dumps([name, dtype, done[name, dtype]]) + "\n")
            print(f"{len(done)}: {name}, {dtype}", file=sys.stderr, flush=True)
    report(
        [
            each
            for (name, dtype), found in done.items()
            if name in options.names and dtype in options.dtypes
            for each in found
        ]
    )
    if failures:
        sys.exit("\n".join(failures))


def known(results: Path | None) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """What an earlier run found, by the model's name and the dtype."""
    if results is None or not results.exists():
        return {}
    lines = (json.loads(line) for line in results.read_text().splitlines())
    return {(name, dtype): found for name, dtype, found in lines}


def judged(name: str, dtype: str, compare_wrong: bool) -> list[dict[str, Any]]:
    """The judgements of one model, in a process of the pool."""
    import torch
    import transformers
    from mutations import judge

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = judge(name, getattr(torch, dtype), Path(folder), compare_wrong=compare_wrong)
            return [asdict(each) for each in found]
        except Exception as error:
            raise RuntimeError(f"{name} in {dtype} cannot be judged") from error


def report(found: list[dict[str, Any]]) -> None:
    """Name what is judged wrongly; print the figures, by dtype."""
    for dtype in DTYPES:
        of_dtype = [each for each in found if each["dtype"] == dtype]
        exact = [each for each in of_dtype if each["kind"] == "exact"]
        faults = [each for each in of_dtype if each["kind"] != "exact"]
        if not of_dtype:
            continue
        names = {each["name"] for each in of_dtype}
        print(f"{dtype}: {len(names)} models, {len(exact)} conversions, {len(faults)} faults")
        passed = [each for each in exact if each["certificate"] and each["outputs"]]
        tell("  exact conversions that pass", exact, passed)
        rejected = [each for each in faults if not each["certificate"]]
        tell("  faults that the certificate catches", faults, rejected)
        felt = [each for each in faults if each["outputs"] is not None and each["effect"] > FELT]
        seen = [each for each in felt if not each["outputs"]]
        tell("  faults that change the outputs, caught by comparing these", felt, seen)


def tell(what: str, all_of: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    """The share of what is judged right, and the others by name."""
    if all_of:
        print(f"{what}: {len(right)} of {len(all_of)} ({len(right) / len(all_of):.2%})")
    for each in all_of:
        if each not in right:
            place = f"{each['kind']} {each['tensor']}".strip()
            effect = "" if each["effect"] is None else f" ({each['effect']:.1e})"
            print(f"    not {each['name']}, {each['rewrite']}: {place}{effect}")


if __name__ == "__main__":
    main()
