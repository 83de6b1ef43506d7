"""How far two models' outputs lie apart, as figures.

Outputs are [positions, features]. The features may be a large vocabulary, so a few positions are
taken at a time, in float64.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import torch

from normconvert.ir.report import Comparison

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMES_FLOOR = 4.0
_POSITIONS = 16


def comparison(
    name: str,
    reference: torch.Tensor,
    candidate: torch.Tensor,
    floors: list[tuple[float, float]],
    text: torch.Tensor | None,
) -> Comparison:
    largest, rms = _distance(reference, candidate)
    floor_max = max((each[0] for each in floors), default=0.0)
    floor_rms = max((each[1] for each in floors), default=0.0)
    return Comparison(
        tokens=name,
        positions=len(reference),
        max=largest,
        rms=rms,
        kl=_divergence(reference, candidate),
        top1=float((reference.argmax(-1) == candidate.argmax(-1)).to(torch.float64).mean()),
        perplexity=None
        if text is None
        else (_perplexity(reference, text), _perplexity(candidate, text)),
        floor_max=floor_max,
        floor_rms=floor_rms,
        distribution=_distribution(reference, candidate),
        equivalent=largest <= TIMES_FLOOR * floor_max and rms <= TIMES_FLOOR * floor_rms,
    )


def times_floor(
    found: dict[str, tuple[float, float]], floors: list[dict[str, tuple[float, float]]]
) -> float:
    """How many times the highest floor a distance is, largest or rms, where it is most times it."""
    highest = {
        (name, i): max((each[name][i] for each in floors), default=0.0)
        for name in found
        for i in range(2)
    }
    times = (
        distance / highest[name, i] if highest[name, i] else math.inf
        for name, distances in found.items()
        for i, distance in enumerate(distances)
        if distance
    )
    return max(times, default=0.0)


def _distribution(reference: torch.Tensor, candidate: torch.Tensor) -> tuple[tuple[int, int], ...]:
    found: Counter[int] = Counter()
    for one, other in _pieces(reference, candidate):
        size = (one - other).abs()
        powers = size[(size > 0) & size.isfinite()].log10().floor().to(torch.int64)
        values, counts = torch.unique(powers, return_counts=True)
        found.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    return tuple(sorted(found.items()))


def _divergence(reference: torch.Tensor, candidate: torch.Tensor) -> float:
    """The mean of KL(reference || candidate), which rounding does not make less than 0."""
    found = []
    for logits in _pieces(reference, candidate):
        p, q = (each.log_softmax(-1) for each in logits)
        found.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(found).mean().clamp(min=0))


def _perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """exp of the mean loss on the next token."""
    following = ids.roll(-1, 1)
    following[:, -1] = -1
    losses = [
        torch.nn.functional.cross_entropy(
            some.to(torch.float64), wanted, ignore_index=-1, reduction="none"
        )
        for some, wanted in zip(
            torch.split(logits, _POSITIONS),
            torch.split(following.flatten(), _POSITIONS),
            strict=True,
        )
    ]
    return float((torch.cat(losses).sum() / ids[:, 1:].numel()).exp())


def output_distances(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]
) -> dict[str, tuple[float, float]]:
    return {name: _distance(tensor, other[name]) for name, tensor in one.items()}


def _distance(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    largest, squares = [], []
    for a, b in _pieces(one, other):
        difference = a - b
        largest.append(difference.abs().max())
        squares.append(difference.square().sum())
    mean = torch.stack(squares).sum() / one.numel()
    return float(torch.stack(largest).max()), float(mean.sqrt())


def _pieces(one: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same positions of both in float64, some at a time: a vocabulary may be large."""
    for a, b in zip(torch.split(one, _POSITIONS), torch.split(other, _POSITIONS), strict=True):
        yield a.to(torch.float64), b.to(torch.float64)
