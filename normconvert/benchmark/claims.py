"""What the papers say that their norms save, beside what was saved here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from normconvert.ir.bench import CONVERTED, Claim, Saving

if TYPE_CHECKING:
    from collections.abc import Iterable

    from normconvert.ir.bench import Measurement


def claims(measurements: Iterable[Measurement], rules: tuple[str, ...]) -> tuple[Claim, ...]:
    """Both papers' claims; whole models count where `rules` made RMSNorms of their LayerNorms."""
    alone, whole = [], []
    for each in measurements:
        if each.task == "norm" and (norm := each.timing("RMSNorm")):
            rows = "1 row" if each.tokens == 1 else f"{each.tokens} rows"
            alone.append(Saving(what=f"RMSNorm alone, {rows}", saved=norm.saved))
        changed = each.timing("as_rmsnorm" if each.task == "training" else CONVERTED)
        if changed and "rmsnorm" in rules:
            name = "training step" if each.task == "training" else each.task
            what = f"{name}, compiled" if each.compiled else name
            whole.append(Saving(what=what, saved=changed.saved))
    return (
        Claim(
            paper="RMSNorm",
            arxiv="1910.07467",
            lower=0.07,
            upper=0.64,
            measured=(*alone, *whole),
        ),
        Claim(
            paper="Pre-RMSNorm and Pre-CRMSNorm",
            arxiv="2305.14858",
            lower=0.01,
            upper=0.10,
            measured=tuple(whole),
        ),
    )
