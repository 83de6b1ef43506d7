"""The kinds of norms by themselves, at a model's hidden size."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from normconvert.benchmark.rounds import Stopwatch, measured, stopwatch
from normconvert.nn import CRMSNorm, DeferredRMSNormLinear, PartialRMSNorm, RMSNorm, recenter

if TYPE_CHECKING:
    from normconvert.ir.bench import Measurement
    from normconvert.ir.graph import Graph

_EPS = 1e-5
_FRACTION = 1 / 16  # what `normconvert prmsnorm` looks at unless told otherwise


def main_norm(graph: Graph, paths: tuple[str, ...]) -> tuple[str, int]:
    """The first of the norms at `paths` that have the hidden size, and that size.

    It is the one that most of them have, the larger of two that are as frequent.
    """
    sizes = {path: graph.values[graph.norm_calls[path][0].outputs[0]].shape[-1] for path in paths}
    known = Counter(size for size in sizes.values() if isinstance(size, int))
    hidden = max(known, key=lambda size: (known[size], size))
    return next(path for path, size in sizes.items() if size == hidden), hidden


def measure_norms(
    size: int, rows: int, own: nn.Module | None, like: torch.Tensor, seconds: float
) -> Measurement:
    """Every kind of norm on [rows, size], compared with torch's LayerNorm.

    `own` is a norm of the model, if it is not such a LayerNorm. `like` has the dtype and device.
    """
    x = _input(size, rows, like)
    compressed = x[:, :-1].contiguous()
    kinds: dict[str, nn.Module] = {
        "LayerNorm": nn.LayerNorm(size, _EPS),
        "RMSNorm": RMSNorm(size, _EPS),
        "RMSNorm, weightless": RMSNorm(size, _EPS, gain=False),
        "RMSNorm, weightless, zero mean": RMSNorm(size, _EPS, gain=False, zero_mean=True),
        "pRMSNorm 1/16, weightless": PartialRMSNorm(size, _EPS, _FRACTION, gain=False),
        "CRMSNorm": CRMSNorm(size, _EPS),
        "CRMSNorm, d coordinates out": CRMSNorm(size, _EPS, expand=True),
    }
    kinds = {name: norm.to(like) for name, norm in kinds.items()}
    if own is not None:  # in the dtype that the model keeps it in
        kinds[f"this model's {type(own).__name__}"] = own
    watches: dict[str, Stopwatch] = {}
    with torch.no_grad():
        for name, norm in kinds.items():
            given = compressed if isinstance(norm, CRMSNorm) else x
            watches[name] = stopwatch(partial(norm, given), like.device)
        return measured("norm", rows, watches, seconds)


def measure_deferred(size: int, rows: int, like: torch.Tensor, seconds: float) -> Measurement:
    """A weightless RMSNorm before a linear, size → size, and its 1/RMS behind it."""
    x = _input(size, rows, like)
    linear = nn.Linear(size, size, bias=False).to(like)
    before = nn.Sequential(RMSNorm(size, _EPS, gain=False), linear)
    behind = DeferredRMSNormLinear(linear, _EPS)
    with torch.no_grad():
        watches = {
            "RMSNorm, then linear": stopwatch(partial(before, x), like.device),
            "deferred 1/RMS": stopwatch(partial(behind, x), like.device),
        }
        return measured("norm and linear", rows, watches, seconds)


def _input(size: int, rows: int, like: torch.Tensor) -> torch.Tensor:
    """Random rows of mean zero, [rows, size]: a promise that one of the norms relies on."""
    return recenter(torch.randn(rows, size)).to(like)
