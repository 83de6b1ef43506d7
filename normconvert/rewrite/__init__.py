"""Rewrite: a plan becomes a folder, in one streaming pass over the checkpoint's bytes."""

from normconvert.rewrite.examine import IDENTITY, examine
from normconvert.rewrite.folder import Staged, stage
from normconvert.rewrite.writer import write

__all__ = ["IDENTITY", "Staged", "examine", "stage", "write"]
