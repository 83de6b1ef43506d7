"""What a conversion will cost, from headers alone."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from normconvert.ir.expression import Center, Expression, Tensor, children, shape_of
from normconvert.ir.report import Cost

if TYPE_CHECKING:
    from normconvert.ir.plan import Plan
    from normconvert.source import Checkpoint

DISK_SPEED = 500_000_000
"""Bytes per second, of a common solid-state disk."""

# Measured with scripts/check_cost.py on torch 2.13 and transformers 5.23.
_STARTING = 5.0  # seconds until torch and transformers are imported
_IMPORTED = 380_000_000  # bytes that they, and the trace of a small model, take
_PER_TENSOR = 3_000  # bytes of the graph and the plan
_PER_THREAD = 12_000_000  # bytes of the blocks that are computed


def estimate(plan: Plan, checkpoint: Checkpoint, disk_speed: int = DISK_SPEED) -> Cost:
    """The cost of writing what `plan` describes, without the verification.

    `disk_speed` is in bytes per second, of reading and writing alike. A plan that changes nothing
    is not carried out.
    """
    if not plan.edits and not plan.omitted and plan.native is None:
        return Cost(read_bytes=0, written_bytes=0, peak_bytes=0, disk_speed=disk_speed, seconds=0.0)
    stored = checkpoint.tensors
    sizes = {name: tensor.nbytes for name, tensor in stored.items()}
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    gone = {*plan.omitted, *(edit.tensor for edit in plan.edits)}
    copied = sum(size for name, size in sizes.items() if name not in gone)
    headers = sum(shard.header.data_start for shard in checkpoint.shards)
    read = copied + sum(_bytes_read(edit.expression, sizes, shapes) for edit in plan.edits)
    written = copied + headers + sum(edit.nbytes for edit in plan.edits)
    threads = os.cpu_count() or 1
    return Cost(
        read_bytes=read,
        written_bytes=written,
        peak_bytes=_IMPORTED + _PER_TENSOR * len(stored) + _PER_THREAD * threads,
        disk_speed=disk_speed,
        seconds=_STARTING + (read + written) / disk_speed,
    )


def _bytes_read(
    expression: Expression, sizes: dict[str, int], shapes: dict[str, tuple[int, ...]]
) -> int:
    """What evaluating `expression` in blocks of rows reads."""
    if isinstance(expression, Tensor):
        return sizes[expression.name]
    once = sum(_bytes_read(child, sizes, shapes) for child in children(expression))
    if isinstance(expression, Center) and expression.axis < len(shape_of(expression, shapes)) - 1:
        return 2 * once  # the mean of all rows comes first
    return once
