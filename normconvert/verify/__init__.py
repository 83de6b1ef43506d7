"""Verify: do two checkpoints compute the same function? Shares no code with `rewrite`."""

from normconvert.verify.algebra import check_sites
from normconvert.verify.certificate import certify, refused, stored_options
from normconvert.verify.logits import choose_dtype, compare

__all__ = ["certify", "check_sites", "choose_dtype", "compare", "refused", "stored_options"]
