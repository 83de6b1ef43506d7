"""Verify: do two checkpoints compute the same function? Shares no code with `rewrite`."""

from normconvert.verify.logits import compare

__all__ = ["compare"]
