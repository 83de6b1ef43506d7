"""Weights less their means, as training needs them in every step: one pass there, one back."""

from __future__ import annotations

import ctypes
import math
import struct
from functools import cache
from typing import Any

import torch
from torch import is_grad_enabled
from torch.compiler import is_compiling

from normconvert.nn.modeling_normconvert import (
    NARROW,
    NUMBERS,
    ONE_THREAD,
    address,
    library,
    transforms,
    watched,
)

_KERNEL = r"""
enum { CHUNK = 256 };

struct axis {
  int64_t dtype, inner;        /* x is [outer, given, inner], y is [outer, kept, inner] */
  int64_t size, given, kept;   /* of the axis; the coordinates that x lacks are 0 */
};

static int64_t at_most(int64_t most, int64_t number) { return number < most ? number : most; }

/* Of one row, where nothing is behind the axis. */
static void center_row(const struct axis *axis, const char *x, char *y) {
  const int64_t given = axis->given, kept = axis->kept, bytes = axis->dtype == FLOAT32 ? 4 : 2;
  float part[CHUNK], sum, squares;
  double total = 0;
  for (int64_t i = 0; i < given; i += CHUNK) {
    widen(x + i * bytes, axis->dtype, at_most(CHUNK, given - i), part);
    sums(part, at_most(CHUNK, given - i), &sum, &squares);
    total += sum;
  }
  const float mean = total / axis->size;
  for (int64_t i = 0; i < kept; i += CHUNK) {
    const int64_t n = at_most(CHUNK, kept - i);
    memset(part, 0, sizeof part);
    if (i < given) widen(x + i * bytes, axis->dtype, at_most(n, given - i), part);
    for (int64_t k = 0; k < n; k++) part[k] -= mean;
    narrow(part, axis->dtype, n, y + i * bytes);
  }
}

/* Of `n` columns that lie side by side. */
static void center_columns(const struct axis *axis, const char *x, char *y, int64_t n) {
  const int64_t bytes = axis->dtype == FLOAT32 ? 4 : 2, step = axis->inner * bytes;
  float part[CHUNK] = {0}, mean[CHUNK];
  double total[CHUNK] = {0};
  for (int64_t i = 0; i < axis->given; i++) {
    widen(x + i * step, axis->dtype, n, part);
    for (int64_t k = 0; k < n; k++) total[k] += part[k];
  }
  for (int64_t k = 0; k < n; k++) mean[k] = total[k] / axis->size;
  for (int64_t i = 0; i < axis->kept; i++) {
    if (i < axis->given) widen(x + i * step, axis->dtype, n, part);
    for (int64_t k = 0; k < n; k++) part[k] = (i < axis->given ? part[k] : 0) - mean[k];
    narrow(part, axis->dtype, n, y + i * step);
  }
}

/* y = x minus its mean over an axis. */
void center(const struct axis *axis, const char *x, char *y, int64_t outer, int64_t threads) {
  const int64_t bytes = axis->dtype == FLOAT32 ? 4 : 2, inner = axis->inner;
  const int64_t parts = (inner + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < outer * parts; i++) {
    const int64_t column = i % parts * CHUNK;
    const char *from = x + (i / parts * axis->given * inner + column) * bytes;
    char *to = y + (i / parts * axis->kept * inner + column) * bytes;
    if (inner == 1)
      center_row(axis, from, to);
    else
      center_columns(axis, from, to, at_most(CHUNK, inner - column));
  }
}
"""


def centered(x: torch.Tensor, axis: int, *, drop_last: bool = False) -> torch.Tensor:
    """x less its mean over an axis, which may lose its last coordinate, in the dtype of x.

    Half precision is widened to float32 and rounded once. On the CPU it is one kernel, if there
    is a C compiler, except in float64.
    """
    size = x.shape[axis]
    return _centered(x, axis % x.ndim, size, size - drop_last)


def _centered(x: torch.Tensor, axis: int, size: int, kept: int) -> torch.Tensor:
    """The first `kept` of `size` coordinates of x less its mean; those that x lacks are 0."""
    unseen = x.dtype in NARROW and not is_compiling() and not watched()
    if unseen and address(x) and _kernel() is not None:
        if not (x.requires_grad and is_grad_enabled()):
            return _by_kernel(x, axis, size, kept)
        if not transforms():
            found: torch.Tensor = _Centered.apply(x, axis, size, kept)  # type: ignore[no-untyped-call]
            return found
    wide = x.float() if x.dtype in NARROW else x
    mean = wide.sum(axis, keepdim=True) / size
    given = x.shape[axis]
    parts = (wide.narrow(axis, 0, min(given, kept)) - mean, -mean)
    return (torch.cat(parts, axis) if kept > given else parts[0]).to(x.dtype)


class _Centered(torch.autograd.Function):
    """By the kernel. It is symmetric: its derivative is the same with in and out exchanged."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: int, size: int, kept: int) -> torch.Tensor:
        ctx.axis, ctx.size, ctx.given = axis, size, x.shape[axis]
        return _by_kernel(x, axis, size, kept)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[Any, ...]:
        return _centered(g.contiguous(), ctx.axis, ctx.size, ctx.given), None, None, None


def _by_kernel(x: torch.Tensor, axis: int, size: int, kept: int) -> torch.Tensor:
    kernel = _kernel()
    assert kernel is not None
    outer, (given, *inner) = x.shape[:axis], x.shape[axis:]
    out = x.new_empty(*outer, kept, *inner)
    kernel.center(
        struct.pack("5q", NARROW[x.dtype], math.prod(inner), size, given, kept),
        x.data_ptr(),
        out.data_ptr(),
        math.prod(outer),
        1 if x.numel() < ONE_THREAD else torch.get_num_threads(),
    )
    return out


@cache
def _kernel() -> ctypes.CDLL | None:
    if (found := library(NUMBERS + _KERNEL)) is not None:
        place, number = ctypes.c_void_p, ctypes.c_int64
        found.center.argtypes = [ctypes.c_char_p, place, place, number, number]
        found.center.restype = None
    return found
