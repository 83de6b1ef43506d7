"""Source: a local folder or a Hub id becomes a `Checkpoint`, read lazily, headers only."""

from normconvert.source.checkpoint import Checkpoint, Shard, open_checkpoint
from normconvert.source.header import Header, Tensor, encode_header, read_header
from normconvert.source.hub import local_path

__all__ = [
    "Checkpoint",
    "Header",
    "Shard",
    "Tensor",
    "encode_header",
    "local_path",
    "open_checkpoint",
    "read_header",
]
