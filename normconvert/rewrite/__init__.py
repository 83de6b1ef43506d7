"""Rewrite: a plan becomes a folder, in one streaming pass over the checkpoint's bytes."""

from normconvert.rewrite.examine import examine
from normconvert.rewrite.folder import Staged, stage, writing
from normconvert.rewrite.layout import Layout, lay_out, reads
from normconvert.rewrite.writer import (
    add_to_manifest,
    empty,
    is_complete,
    preview,
    require_space,
    rules_in_manifest,
    write,
    write_files,
    write_shards,
)

__all__ = [
    "Layout",
    "Staged",
    "add_to_manifest",
    "empty",
    "examine",
    "is_complete",
    "lay_out",
    "preview",
    "reads",
    "require_space",
    "rules_in_manifest",
    "stage",
    "write",
    "write_files",
    "write_shards",
    "writing",
]
