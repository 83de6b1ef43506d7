"""Verify: do two checkpoints compute the same function? Shares no code with `rewrite`."""

from normconvert.verify.algebra import check_sites
from normconvert.verify.certificate import certify, refused, stored_options
from normconvert.verify.logits import compare
from normconvert.verify.placement import place

__all__ = ["certify", "check_sites", "compare", "place", "refused", "stored_options"]
