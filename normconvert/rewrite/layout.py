"""Where every tensor of an output shard lies, settled before any byte is written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from normconvert.ir.expression import tensors as tensors_of
from normconvert.ir.plan import DTYPE_BYTES
from normconvert.source import Checkpoint, Header, Shard, Tensor, encode_header

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

    @property
    def parsed_header(self) -> Header:
        """What reading the file's header will give."""
        stored = {tensor.name: tensor for tensor in self.shard.header.tensors}
        tensors = []
        for placed in self.tensors:
            known = placed.edit or stored[placed.name]
            stop = placed.start + placed.nbytes
            tensors.append(
                Tensor(
                    name=placed.name,
                    dtype=known.dtype,
                    shape=known.shape,
                    start=placed.start,
                    stop=stop,
                )
            )
        return Header(
            tensors=tuple(tensors),
            metadata=self.shard.header.metadata,
            data_start=len(self.header),
        )


@dataclass(frozen=True, slots=True)
class Span:
    """Rows `first` to `last` of an edited tensor or, without `edit`, of the source's shard.

    A row of the shard is one byte. In the output they lie from byte `start` on.
    """

    edit: Edit | None
    first: int
    last: int
    row_bytes: int
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the span."""
        return (self.last - self.first) * self.row_bytes


def lay_out(plan: Plan, checkpoint: Checkpoint) -> tuple[Layout, ...]:
    """Every shard with the tensors that it had, in their order; new ones end the last shard."""
    edits = {edit.tensor: edit for edit in plan.edits}
    new = [edit for edit in plan.edits if edit.tensor not in checkpoint.tensors]
    last = checkpoint.shards[-1]
    omitted = frozenset(plan.omitted)
    return tuple(
        _lay_out(shard, edits, omitted, new if shard is last else []) for shard in checkpoint.shards
    )


def reads(layout: Layout) -> set[str]:
    """The source's tensors that the shard's edits are made of, in whatever shard they lie."""
    edits = (placed.edit for placed in layout.tensors if placed.edit is not None)
    return {name for edit in edits for name in tensors_of(edit.expression)}


def batches(layout: Layout, nbytes: int) -> Iterator[list[Span]]:
    """All of the shard in order, in lists of about `nbytes` bytes."""
    batch: list[Span] = []
    left = nbytes
    for whole in _spans(layout.tensors):
        for first, last in row_blocks(whole.first, whole.last, whole.row_bytes, nbytes):
            start = whole.start + (first - whole.first) * whole.row_bytes
            batch.append(replace(whole, first=first, last=last, start=start))
            left -= batch[-1].nbytes
            if left <= 0:
                yield batch
                batch, left = [], nbytes
    if batch:
        yield batch


def row_blocks(first: int, last: int, row_bytes: int, nbytes: int) -> list[tuple[int, int]]:
    """The rows from `first` to `last` in ranges of at most `nbytes`, or of one row."""
    step = max(1, nbytes // max(1, row_bytes))
    return [(row, min(row + step, last)) for row in range(first, last, step)]


def _spans(tensors: tuple[Placed, ...]) -> Iterator[Span]:
    """One span for every edited tensor, and one for the unchanged ones between two of them."""
    for unchanged, group in groupby(tensors, lambda placed: placed.edit is None):
        if unchanged:
            yield from _runs(list(group))
            continue
        for placed in group:
            assert placed.edit is not None
            rows = math.prod(placed.edit.shape[:-1])
            yield Span(placed.edit, 0, rows, placed.nbytes // max(1, rows), placed.start)


def _runs(tensors: list[Placed]) -> Iterator[Span]:
    """Unchanged tensors that lie one behind the other in the source too, as one span each."""
    while tensors:
        first, stop, count = tensors[0], tensors[0].source_start, 0
        while count < len(tensors) and tensors[count].source_start == stop:
            stop += tensors[count].nbytes
            count += 1
        yield Span(None, first.source_start, stop, 1, first.start)
        tensors = tensors[count:]


def _lay_out(
    shard: Shard, edits: dict[str, Edit], omitted: frozenset[str], new: list[Edit]
) -> Layout:
    entries = [
        (edit.tensor, edit.dtype, edit.shape)
        if (edit := edits.get(tensor.name))
        else (tensor.name, tensor.dtype, tensor.shape)
        for tensor in shard.header.tensors
        if tensor.name not in omitted
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
