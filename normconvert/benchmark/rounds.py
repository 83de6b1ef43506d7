"""Measuring in rounds: every contestant runs once in each, so that noise falls on all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch

from normconvert.ir.bench import Measurement, Quartiles, Task, Timing

Stopwatch: TypeAlias = Callable[[], float]
"""Runs a contestant, and gives the seconds that one call of it took."""

LEAST_ROUNDS = 5
_SAMPLE = 2e-4  # seconds; shorter calls are repeated until one sample takes about this long


def measured(
    task: Task,
    tokens: int | None,
    contestants: Mapping[str, Stopwatch],
    seconds: float,
    *,
    compiled: bool = False,
    note: str | None = None,
) -> Measurement:
    """As many rounds as `seconds` are enough for, but at least five, after one that is not counted.

    The order changes from round to round: what ran just before has an influence. A speedup is
    taken within a round, so that what slows the machine for longer than a round cancels.
    """
    names = [*contestants]
    times: dict[str, list[float]] = {name: [] for name in names}
    for watch in contestants.values():
        watch()
    rounds, end = 0, time.perf_counter() + seconds
    with _no_collection():
        while rounds < LEAST_ROUNDS or time.perf_counter() < end:
            for name in order(names, rounds):
                times[name].append(contestants[name]())
            rounds += 1
    baseline = times[names[0]]
    timings = tuple(
        Timing(
            name=name,
            seconds=quartiles(taken),
            speedup=quartiles([b / own for b, own in zip(baseline, taken, strict=True)]),
        )
        for name, taken in times.items()
    )
    return Measurement(
        task=task, compiled=compiled, tokens=tokens, rounds=rounds, timings=timings, note=note
    )


def quartiles(values: Sequence[float]) -> Quartiles:
    """The quartiles of at least two numbers."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(lower=lower, median=median, upper=upper)


def order(names: Sequence[str], turn: int) -> list[str]:
    """The `names` in the order of the round `turn`: rotated, and each second time backwards."""
    start = turn // 2 % len(names)
    rotated = [*names[start:], *names[:start]]
    return rotated[::-1] if turn % 2 else rotated


def stopwatch(run: Callable[[], object], device: torch.device) -> Stopwatch:
    """One that calls `run` often enough to be measured."""

    def seconds(calls: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        return (time.perf_counter() - start) / calls

    seconds(1)  # the first call allocates, or compiles
    calls = max(1, round(_SAMPLE / seconds(1)))
    return lambda: seconds(calls)


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected inside, which would be counted as somebody's time."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
