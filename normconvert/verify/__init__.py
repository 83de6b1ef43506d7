"""Verify: do two checkpoints compute the same function? Shares no code with `rewrite`."""

from normconvert.verify.algebra import check_sites
from normconvert.verify.certificate import (
    certify,
    certify_form,
    certify_tensors,
    refused,
    stored_model,
    stored_options,
    together,
)
from normconvert.verify.logits import compare
from normconvert.verify.placement import place

__all__ = [
    "certify",
    "certify_form",
    "certify_tensors",
    "check_sites",
    "compare",
    "place",
    "refused",
    "stored_model",
    "stored_options",
    "together",
]
