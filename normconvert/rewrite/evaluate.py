"""Evaluating expressions: vectors whole, matrices in blocks of rows, everything rounded once.

A tensor of more than one dimension is seen as a matrix of rows: all axes but the last are
flattened. Only the rows asked for are read.
"""

from __future__ import annotations

import math
import os
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING

import torch

from normconvert.errors import RewriteError
from normconvert.ir.expression import (
    AddProduct,
    Center,
    Divide,
    DropLast,
    Expression,
    Fill,
    MinusLast,
    Plus,
    Scale,
    Spread,
    Tensor,
    positions,
    shape_of,
)
from normconvert.rewrite.layout import row_blocks
from normconvert.rewrite.rounding import multiply, product_dtype, round_once
from normconvert.source.checkpoint import opened
from normconvert.torch_dtypes import TORCH_DTYPE

if TYPE_CHECKING:
    from normconvert.ir.plan import Edit
    from normconvert.source import Checkpoint

BLOCK_BYTES = 1 << 20
"""Bytes that are computed at a time: what a core's cache holds, and malloc keeps mapped."""


class Evaluator:
    """Computes the tensors of a plan from a checkpoint. Safe to use from several threads."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors = checkpoint.tensors
        self._shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        self._paths = checkpoint.paths
        self._files: dict[Path, int] = {}
        # All blocks of a tensor, and mostly its neighbours, share one factor.
        self._cached_factor = lru_cache(maxsize=16)(self._whole_factor)
        self._cached_mean = lru_cache(maxsize=4)(self._whole_mean)
        self._cached_last = lru_cache(maxsize=4)(self._whole_last)
        self._one_at_a_time = RLock()

    def __enter__(self) -> Evaluator:
        for path in set(self._paths.values()):
            self._files[path] = opened(path)
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            os.close(file)

    def rows(self, edit: Edit, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of the edit's tensor, in its stored dtype, contiguous.

        Raises:
            RewriteError: a value does not fit the dtype, or the source cannot be read.
        """
        dtype = TORCH_DTYPE[edit.dtype]
        if len(edit.shape) < 2:
            exact = self.vector(edit.expression, math.prod(edit.shape))
            result, finite = round_once(exact, dtype), exact.isfinite()
        else:
            result = self._block(edit, dtype, start, stop)
            finite = None
        if not _looks_finite(result):
            self._refuse_overflow(edit, result, start, stop, finite)
        return result

    def vector(self, expression: Expression, size: int) -> torch.Tensor:
        """The whole vector `expression` of `size` elements in float64.

        Raises:
            RewriteError: a division by zero, or the source cannot be read.
        """
        match expression:
            case Tensor(name):
                return self._read(name, 0, 1).reshape(-1).to(torch.float64)
            case Fill(value):
                return torch.full((size,), value, dtype=torch.float64)
            case Plus(of, number):
                return self.vector(of, size) + number
            case Divide(of, by):
                return self._divide(expression, self.vector(of, size), self.vector(by, size))
            case Scale(of, _, by):
                return self.vector(of, size) * self.vector(by, size)
            case Center(of, _):
                whole = self.vector(of, size)
                return whole - whole.mean()
            case DropLast(of, _):
                return self.vector(of, size + 1)[:-1]
            case MinusLast(of, _):
                whole = self.vector(of, size + 1)
                return whole[:-1] - whole[-1]
            case Spread(of, runs):
                index = torch.tensor(positions(runs))
                source = self.vector(of, int(index.max()) + 1)
                return torch.where(index < 0, 1.0, source[index.clamp(min=0)])
            case AddProduct(of, matrix, axis, vector):
                return self.vector(of, size) + self._product(matrix, axis, vector)

    def _block(self, edit: Edit, dtype: torch.dtype, start: int, stop: int) -> torch.Tensor:
        match edit.expression:
            case Tensor(name):
                return round_once(self._read(name, start, stop), dtype)
            case Scale(Tensor(name), axis, by) if TORCH_DTYPE[self._tensors[name].dtype] is dtype:
                factor = self._factor(by, edit.shape, axis, start, stop, dtype)
                block = self._read(name, start, stop)
                return multiply(block, factor)
        return round_once(self._matrix(edit.expression, edit.shape, start, stop), dtype)

    def _matrix(
        self, expression: Expression, shape: tuple[int, ...], start: int, stop: int
    ) -> torch.Tensor:
        """Rows of a matrix in float64."""
        match expression:
            case Tensor(name):
                return self._read(name, start, stop).to(torch.float64)
            case Scale(of, axis, by):
                factor = self._factor(by, shape, axis, start, stop, torch.float64)
                return self._matrix(of, shape, start, stop).mul_(factor)
            case Center(of, axis):
                rows = self._matrix(of, shape, start, stop)
                if axis == len(shape) - 1:
                    return rows.sub_(rows.mean(-1, keepdim=True))
                return rows.sub_(self._mean(of, shape, axis)[_across(shape, axis, start, stop)])
            case DropLast(of, axis) | MinusLast(of, axis):
                longer = (*shape[:axis], shape[axis] + 1, *shape[axis + 1 :])
                less = isinstance(expression, MinusLast)
                if axis == len(shape) - 1:
                    rows = self._matrix(of, longer, start, stop)
                    return rows[:, :-1] - rows[:, -1:] if less else rows[:, :-1].contiguous()
                rows = self._without_last(of, longer, axis, start, stop)
                if not less:
                    return rows
                return rows.sub_(self._last(of, longer, axis)[_across(shape, axis, start, stop)])
        raise RewriteError(f"{expression} is not a matrix.")

    def _without_last(
        self, of: Expression, longer: tuple[int, ...], axis: int, start: int, stop: int
    ) -> torch.Tensor:
        """Rows `start` to `stop` of what is left of `of`, of shape `longer`.

        What it drops is the last slice along `axis`, which is not the last axis.
        """
        inner = math.prod(longer[axis + 1 : -1])
        outer = (longer[axis] - 1) * inner
        first, last = (row + row // outer * inner for row in (start, stop - 1))
        coordinate = torch.arange(first, last + 1).div(inner, rounding_mode="floor")
        kept = coordinate % longer[axis] < longer[axis] - 1
        return self._matrix(of, longer, first, last + 1)[kept]

    def _mean(self, of: Expression, shape: tuple[int, ...], axis: int) -> torch.Tensor:
        """The mean over `axis`, which is not the last: [all other axes but the last, last]."""
        with self._one_at_a_time:  # all blocks of a tensor need the same one
            return self._cached_mean(of, shape, axis)

    def _whole_mean(self, of: Expression, shape: tuple[int, ...], axis: int) -> torch.Tensor:
        inner = math.prod(shape[axis + 1 : -1])
        total = torch.zeros(math.prod(shape[:axis]) * inner, shape[-1], dtype=torch.float64)
        for start, stop in row_blocks(0, math.prod(shape[:-1]), shape[-1] * 8, BLOCK_BYTES):
            rows = self._matrix(of, shape, start, stop)
            if len(total) == 1:
                total += rows.sum(0)
            else:
                total.index_add_(0, _across(shape, axis, start, stop), rows)
        return total / shape[axis]

    def _last(self, of: Expression, longer: tuple[int, ...], axis: int) -> torch.Tensor:
        """The last slice along `axis`, as `_mean` gives the mean."""
        with self._one_at_a_time:
            return self._cached_last(of, longer, axis)

    def _whole_last(self, of: Expression, longer: tuple[int, ...], axis: int) -> torch.Tensor:
        inner = math.prod(longer[axis + 1 : -1])
        ends = range(1, math.prod(longer[:axis]) + 1)
        stops = [end * longer[axis] * inner for end in ends]
        return torch.cat([self._matrix(of, longer, stop - inner, stop) for stop in stops])

    def _factor(
        self,
        by: Expression,
        shape: tuple[int, ...],
        axis: int,
        start: int,
        stop: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """What each element of the rows is multiplied with, to be broadcast; see _whole_factor."""
        vector = self._cached_factor(by, shape[axis], dtype)
        if axis == len(shape) - 1:
            return vector
        inner = math.prod(shape[axis + 1 : -1])
        coordinate = torch.arange(start, stop).div(inner, rounding_mode="floor") % shape[axis]
        return vector[coordinate].unsqueeze(1)

    def _whole_factor(self, by: Expression, size: int, dtype: torch.dtype) -> torch.Tensor:
        """The vector `by` in the dtype to multiply in, of which its product with `dtype` is."""
        factor = self.vector(by, size)
        return factor.to(product_dtype(factor, dtype))

    def _product(self, matrix: Expression, axis: int, vector: Expression) -> torch.Tensor:
        shape = shape_of(matrix, self._shapes)
        factor = self.vector(vector, shape[axis])
        pieces = (
            (start, stop, self._matrix(matrix, shape, start, stop))
            for start, stop in row_blocks(0, shape[0], shape[1] * 8, BLOCK_BYTES)
        )
        if axis == 1:
            return torch.cat([rows @ factor for _, _, rows in pieces])
        total = torch.zeros(shape[1], dtype=torch.float64)
        for start, stop, rows in pieces:
            total += factor[start:stop] @ rows
        return total

    def _divide(self, expression: Expression, of: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        zero = by == 0
        if bool((zero & (of != 0)).any()):
            raise RewriteError(f"{expression} divides by zero.")
        return torch.where(zero, 0.0, of / torch.where(zero, 1.0, by))

    def _read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a stored tensor; a tensor of one dimension is one row."""
        tensor = self._tensors[name]
        columns = tensor.shape[-1] if tensor.shape else 1
        dtype = TORCH_DTYPE[tensor.dtype]
        row_bytes = columns * dtype.itemsize
        block = torch.empty((stop - start, columns), dtype=dtype)
        if not block.numel():
            return block
        buffer = block.view(torch.uint8).numpy().data.cast("B")
        file, offset = self._files[self._paths[name]], tensor.start + start * row_bytes
        while buffer:
            count = os.preadv(file, [buffer], offset)
            if count == 0:
                raise RewriteError(f"{self._paths[name]} became shorter while it was read.")
            buffer, offset = buffer[count:], offset + count
        return block

    def _refuse_overflow(
        self,
        edit: Edit,
        result: torch.Tensor,
        start: int,
        stop: int,
        finite: torch.Tensor | None,
    ) -> None:
        """Refuse values that only the edit made infinite; one that was infinite may stay."""
        if finite is None:
            finite = self._matrix(edit.expression, edit.shape, start, stop).isfinite()
        if bool((finite & ~result.isfinite()).any()):
            remedy = (
                "give --dtype bfloat16 or --dtype float32"
                if edit.dtype == "F16"
                else "no dtype of greater range is offered, so the checkpoint must stay as it is"
            )
            raise RewriteError(
                f"{edit.tensor!r} would overflow to infinity in {edit.dtype}; {remedy}."
            )


def _across(shape: tuple[int, ...], axis: int, start: int, stop: int) -> torch.Tensor:
    """For each row the number of its place across `axis`: what all along the axis share."""
    inner = math.prod(shape[axis + 1 : -1])
    row = torch.arange(start, stop)
    return row.div(inner * shape[axis], rounding_mode="floor") * inner + row % inner


def _looks_finite(values: torch.Tensor) -> bool:
    """True only if all `values` are finite, without the temporary that `isfinite` makes.

    Their sum is not finite if one of them is not, but may overflow by itself.
    """
    wide = torch.float32 if values.dtype is torch.float16 else None
    return math.isfinite(values.sum(dtype=wide).item())
