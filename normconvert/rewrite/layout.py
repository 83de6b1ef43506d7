"""Where every tensor of an output shard lies, settled before any byte is written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from normconvert.ir.plan import DTYPE_BYTES
from normconvert.source import Checkpoint, Shard, encode_header

if TYPE_CHECKING:
    from normconvert.ir.plan import Edit, Plan


@dataclass(frozen=True, slots=True)
class Placed:
    """One tensor of an output shard; `start` counts from the file's first byte.

    `edit` is None for a tensor that is copied from `source_start` of the source's shard.
    """

    name: str
    start: int
    nbytes: int
    edit: Edit | None
    source_start: int


@dataclass(frozen=True, slots=True)
class Layout:
    """An output shard: its first bytes and its tensors in order."""

    shard: Shard
    header: bytes
    tensors: tuple[Placed, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(placed.nbytes for placed in self.tensors)


def lay_out(plan: Plan, checkpoint: Checkpoint) -> tuple[Layout, ...]:
    """Every shard with the tensors that it had, in their order; new ones end the last shard."""
    edits = {edit.tensor: edit for edit in plan.edits}
    new = [edit for edit in plan.edits if edit.tensor not in checkpoint.tensors]
    last = checkpoint.shards[-1]
    return tuple(
        _lay_out(shard, edits, new if shard is last else []) for shard in checkpoint.shards
    )


def _lay_out(shard: Shard, edits: dict[str, Edit], new: list[Edit]) -> Layout:
    entries = [
        (edit.tensor, edit.dtype, edit.shape)
        if (edit := edits.get(tensor.name))
        else (tensor.name, tensor.dtype, tensor.shape)
        for tensor in shard.header.tensors
    ]
    entries += [(edit.tensor, edit.dtype, edit.shape) for edit in new]
    header = encode_header(entries, shard.header.metadata)
    starts = {tensor.name: tensor.start for tensor in shard.header.tensors}
    placed = []
    offset = len(header)
    for name, dtype, shape in entries:
        nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
        placed.append(Placed(name, offset, nbytes, edits.get(name), starts.get(name, -1)))
        offset += nbytes
    return Layout(shard, header, tuple(placed))
