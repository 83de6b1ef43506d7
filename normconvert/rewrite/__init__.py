"""Rewrite: a plan becomes a folder, in one streaming pass over the checkpoint's bytes."""

from normconvert.rewrite.examine import IDENTITY, examine
from normconvert.rewrite.folder import Staged, stage
from normconvert.rewrite.writer import add_to_manifest, preview, rules_in_manifest, write

__all__ = [
    "IDENTITY",
    "Staged",
    "add_to_manifest",
    "examine",
    "preview",
    "rules_in_manifest",
    "stage",
    "write",
]
