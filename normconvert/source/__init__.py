"""Source: a local folder or a Hub id becomes a `Checkpoint`, read lazily, headers only."""

from normconvert.source.checkpoint import Checkpoint, Shard, open_checkpoint
from normconvert.source.header import Header, Tensor, encode_header, read_header

__all__ = [
    "Checkpoint",
    "Header",
    "Shard",
    "Tensor",
    "encode_header",
    "open_checkpoint",
    "read_header",
]
