"""Verify: do two checkpoints compute the same function? Shares no code with `rewrite`."""

from normconvert.verify.logits import choose_dtype, compare

__all__ = ["choose_dtype", "compare"]
