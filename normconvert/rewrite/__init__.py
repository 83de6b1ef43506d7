"""Rewrite: a plan becomes a folder, in one streaming pass over the checkpoint's bytes."""

from normconvert.rewrite.examine import examine
from normconvert.rewrite.folder import Staged, stage
from normconvert.rewrite.writer import write

__all__ = ["Staged", "examine", "stage", "write"]
