"""Where two models part, in the words of a terminal and of an HTML page."""

from __future__ import annotations

from normconvert.ir.report import Equivalence


def parting(report: Equivalence) -> str | None:
    """The first layer at which they are further apart than rounding explains, in a sentence."""
    if report.parts_at is None:
        return None
    layer = next(layer for layer in report.layers if layer.module == report.parts_at)
    return (
        f"The two part at {layer.module}: behind it their states differ by {layer.rms:.1e} (RMS; "
        f"the noise floor is {layer.floor:.1e})."
    )
