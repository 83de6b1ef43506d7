"""What the papers say that their norms save, beside what was saved here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from normconvert.ir.bench import CONVERTED, Claim, Saving

if TYPE_CHECKING:
    from collections.abc import Iterable

    from normconvert.ir.bench import Measurement, Timing


def claims(
    measurements: Iterable[Measurement], rules: tuple[str, ...], *, busy: bool
) -> tuple[Claim, ...]:
    """Both papers' claims; whole models count where `rules` made RMSNorms of their LayerNorms.

    Of a `busy` machine, and of rounds that differ much, nothing is held against them.
    """
    alone: list[tuple[str, Timing]] = []
    whole: list[tuple[str, Timing]] = []
    for each in measurements:
        if each.task == "norm" and (norm := each.timing("RMSNorm")):
            rows = "1 row" if each.tokens == 1 else f"{each.tokens} rows"
            alone.append((f"RMSNorm alone, {rows}", norm))
        changed = each.timing("as_rmsnorm" if each.task == "training" else CONVERTED)
        if changed and "rmsnorm" in rules:
            name = "training step" if each.task == "training" else each.task
            whole.append((f"{name}, compiled" if each.compiled else name, changed))

    def claim(
        paper: str, arxiv: str, lower: float, upper: float, found: list[tuple[str, Timing]]
    ) -> Claim:
        measured = tuple(
            Saving(what=what, saved=timing.saved)
            for what, timing in found
            if timing.speedup.steady and not busy
        )
        return Claim(
            paper=paper,
            arxiv=arxiv,
            lower=lower,
            upper=upper,
            measured=measured,
            left_out=len(found) - len(measured),
        )

    return (
        claim("RMSNorm", "1910.07467", 0.07, 0.64, [*alone, *whole]),
        claim("Pre-RMSNorm and Pre-CRMSNorm", "2305.14858", 0.01, 0.10, whole),
    )
