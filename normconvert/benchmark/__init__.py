"""Bench: what a conversion buys on this machine, measured in turn with what it is compared to."""

from normconvert.benchmark.checkpoints import bench

__all__ = ["bench"]
