"""Bench: what a conversion buys on this machine, measured in turn with what it is compared to."""

from normconvert.bench.measure import Options, measure

__all__ = ["Options", "measure"]
