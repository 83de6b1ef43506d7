"""Bench: what a conversion buys on this machine, measured in turn with what it is compared to."""

from normconvert.bench.report import measure

__all__ = ["measure"]
