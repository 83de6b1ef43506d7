"""Source: a local folder or a Hub id becomes a `Checkpoint`, read lazily, headers only."""

from normconvert.source.checkpoint import Checkpoint, open_checkpoint
from normconvert.source.header import Header, Shard, Tensor, encode_header, read_header
from normconvert.source.hub import Extent, local_path
from normconvert.source.remote import at_hand, download

__all__ = [
    "Checkpoint",
    "Extent",
    "Header",
    "Shard",
    "Tensor",
    "at_hand",
    "download",
    "encode_header",
    "local_path",
    "open_checkpoint",
    "read_header",
]
