"""The norms of a converted model. This file travels with it: it needs torch, not normconvert.

Shapes: d is the hidden size, x is [..., d], or [..., d - 1] where it is compressed.

RMSNorm and pRMSNorm are of arXiv 1910.07467, recentering, compression and CRMSNorm of
arXiv 2305.14858, the deferred 1/RMS of arXiv 2407.09577.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
import torch.nn.functional as F
import transformers
from torch import is_grad_enabled, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

Factor: TypeAlias = "torch.Tensor | None"

# Measured on torch 2.13, x86 with AVX2: from here on the set-up of the faster kernel pays.
_MANY_NUMBERS = 2**18


def recenter(x: torch.Tensor) -> torch.Tensor:
    """x - mean(x) over the last axis, [..., d] → [..., d] (arXiv 2305.14858, section 3.1)."""
    wide = _wide(x)
    return (wide - wide.mean(-1, keepdim=True)).to(x.dtype)


def compress(x: torch.Tensor) -> torch.Tensor:
    """The first d - 1 coordinates of `recenter(x)`, [..., d] → [..., d - 1] (2305.14858)."""
    wide = _wide(x)
    return (wide[..., :-1] - wide.mean(-1, keepdim=True)).to(x.dtype)


def expand(x: torch.Tensor) -> torch.Tensor:
    """The zero-mean vector that x is the compressed form of, [..., d - 1] → [..., d].

    The last coordinate is minus the sum of the others (arXiv 2305.14858).
    """
    return torch.cat((x, -_wide(x).sum(-1, keepdim=True).to(x.dtype)), dim=-1)


class Recenter(nn.Module):
    """`recenter` as a module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return recenter(x)


class Compress(nn.Module):
    """`compress` as a module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return compress(x)


class _Norm(nn.Module):
    """What the norms share: y · (offset + weight) + bias, [..., size], each part optional."""

    def __init__(
        self,
        size: int,
        eps: float,
        *,
        gain: bool = True,
        bias: bool = False,
        offset: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.size, self.eps, self.offset = size, float(eps), float(offset)
        self._set_shape(used=size)
        # A plain None is found at once; a parameter that is None only after a search, which
        # on one row takes as long as a tenth of the norm.
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if gain:
            self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    def _set_shape(self, *, used: int, lacks: int = 0, adds: int = 0, divided: int = 0) -> None:
        """What the kernel computes: see its `struct shape`."""
        n, d = self.size - lacks, self.size if lacks else used
        self._given, self._adds, self._wide = n, adds, n + adds
        self._shape = struct.pack("6q2d", n, used, d, lacks, adds, divided, self.eps, self.offset)

    def __setattr__(self, name: str, value: Any) -> None:
        """The kernel was told these numbers, as numbers."""
        if name in ("size", "eps", "offset", "used", "expand") and name in self.__dict__:
            kind = type(self).__name__
            raise AttributeError(f"{name} of a {kind} cannot be changed; make another {kind}")
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """The identity: an effective gain of 1, a bias of 0."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 1 - self.offset)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of x by the kernel, or by operations where it must keep out: see `address`."""
        if not is_compiling() and not watched() and (kernel := _kernel()) is not None:
            # `self.weight` would search for it, which takes a tenth of the norm of a row.
            own = self._parameters
            weight = own["weight"] if "weight" in own else self.weight  # noqa: SIM401
            bias = own["bias"] if "bias" in own else self.bias  # noqa: SIM401
            wide, at = self._wide, address(x)
            gain_at, gain_dtype = _address_and_dtype(weight, wide)
            bias_at, bias_dtype = _address_and_dtype(bias, wide)
            gradient = is_grad_enabled() and (
                x.requires_grad
                or (weight is not None and weight.requires_grad)
                or (bias is not None and bias.requires_grad)
            )
            if at and not (gradient and transforms()):
                shape, numbers, dtype = x.shape, x.numel(), NARROW.get(x.dtype, -1)
                threads = 1 if numbers < ONE_THREAD else torch.get_num_threads()
                form = (self._shape, shape[-1], dtype, gain_dtype, bias_dtype, threads)
                y = x.new_empty(*shape[:-1], wide) if self._adds else torch.empty_like(x)
                if kernel.norm(*form, at, gain_at, bias_at, y.data_ptr(), numbers):
                    if not gradient:
                        return y
                    return _differentiable((self, form, y), x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]
        # In torch.jit's trace sizes are tensors, and comparing them would be a part of it.
        if _traced() is None and x.shape[-1:] != (self._given,):
            raise ValueError(f"{self} takes [..., {self._given}], and was given {[*x.shape]}")
        return self._operations(x, self.weight, self.bias)

    def _operations(self, x: torch.Tensor, weight: Factor, bias: Factor) -> torch.Tensor:
        """The norm of x by operations of torch, with these for its weight and bias."""
        raise NotImplementedError

    def _gain_and_bias(self, weight: Factor, bias: Factor) -> tuple[Factor, Factor]:
        """Both at least float32: 1 + w would lose most of a small w in half precision."""
        gain = None if weight is None else _wide(weight)
        if gain is not None and self.offset:
            gain = gain + self.offset
        return gain, None if bias is None else _wide(bias)

    def _scaled(
        self,
        x: torch.Tensor,
        wide: torch.Tensor,
        inverse: torch.Tensor,
        weight: Factor,
        bias: Factor,
    ) -> torch.Tensor:
        """x · inverse · gain + bias, where `wide` is x in float32, in the dtype of x."""
        gain, bias = self._gain_and_bias(weight, bias)
        if gain is None and bias is None:
            return _scale_rows(x, wide, inverse)
        y = wide * inverse
        if gain is not None:
            y = y * gain
        return (y if bias is None else y + bias).to(x.dtype)

    def _layer_norm(self, x: torch.Tensor, gain: Factor, bias: Factor) -> torch.Tensor:
        """torch's LayerNorm, which is RMSNorm where x [..., size] has mean zero."""
        if self.offset or any(f is not None and f.dtype is not x.dtype for f in (gain, bias)):
            wide = self._gain_and_bias(gain, bias)
            gain, bias = (None if each is None else each.float() for each in wide)
        if gain is None and x.dtype is torch.float32 and x.numel() > self.size:
            gain = x.new_ones(self.size)  # without one the float32 kernel is not vectorized
        return torch.layer_norm(x, (self.size,), gain, bias, self.eps)

    def extra_repr(self) -> str:
        parts = [f"{self.size}, eps={self.eps}"]
        parts += ["gain=False"] if self.weight is None else []
        parts += ["bias=True"] if self.bias is not None else []
        parts += [f"offset={self.offset}"] if self.offset else []
        return ", ".join(parts)


class RMSNorm(_Norm):
    """x / sqrt(mean(x²) + eps) · (offset + weight) + bias, [..., d] → [..., d].

    arXiv 1910.07467, equation 4. Half precision is widened to float32 and rounded once, at the
    end. `zero_mean` promises that x has mean zero over the last axis, as the stream of a
    Pre-RMSNorm model has (arXiv 2305.14858): there torch's LayerNorm computes the same.
    """

    def __init__(
        self,
        size: int,
        eps: float,
        *,
        gain: bool = True,
        bias: bool = False,
        offset: float = 0.0,
        zero_mean: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(size, eps, gain=gain, bias=bias, offset=offset, device=device, dtype=dtype)
        self.zero_mean = zero_mean

    def _operations(self, x: torch.Tensor, weight: Factor, bias: Factor) -> torch.Tensor:
        if self.zero_mean and _has_fast_layer_norm(x):
            return self._layer_norm(x, weight, bias)
        if _has_fused_rms_norm(self, x):
            return F.rms_norm(x, (self.size,), weight, self.eps)
        wide = _wide(x)
        return self._scaled(x, wide, _inverse_rms(wide, self.eps), weight, bias)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", zero_mean=True" if self.zero_mean else "")


class PartialRMSNorm(_Norm):
    """RMSNorm whose RMS is that of the first ceil(d · fraction) coordinates, [..., d] → [..., d].

    pRMSNorm of arXiv 1910.07467, section 4.1: an approximation of RMSNorm, not a rewriting of it.
    """

    def __init__(
        self,
        size: int,
        eps: float,
        fraction: float,
        *,
        gain: bool = True,
        bias: bool = False,
        offset: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1, not {fraction}")
        super().__init__(size, eps, gain=gain, bias=bias, offset=offset, device=device, dtype=dtype)
        self.fraction = fraction
        # Rounded first: 100 · 0.07 is a little above 7 in floating point.
        self.used = math.ceil(round(size * fraction, 6))
        self._set_shape(used=self.used)

    def _operations(self, x: torch.Tensor, weight: Factor, bias: Factor) -> torch.Tensor:
        wide = _wide(x)
        return self._scaled(x, wide, _inverse_rms(wide[..., : self.used], self.eps), weight, bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fraction={self.fraction}"


class CRMSNorm(_Norm):
    """x / sqrt((Σx² + (Σx)²) / d + eps), [..., d - 1] → [..., d - 1] (arXiv 2305.14858).

    It is RMSNorm of `expand(x)`, compressed. `size` is d, the hidden size before compression.
    With `expand` the output is [..., d], its last coordinate minus the sum of the others, and
    gain and bias, of length d, apply to that. Without, they must have been folded before.
    """

    def __init__(
        self,
        size: int,
        eps: float,
        *,
        gain: bool = False,
        bias: bool = False,
        offset: float = 0.0,
        expand: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if (gain or bias) and not expand:
            raise ValueError("a compressed output has no gain or bias; fold them or expand")
        super().__init__(size, eps, gain=gain, bias=bias, offset=offset, device=device, dtype=dtype)
        self.expand = expand
        self._set_shape(used=size - 1, lacks=True, adds=expand)

    def _operations(self, x: torch.Tensor, weight: Factor, bias: Factor) -> torch.Tensor:
        wide = _wide(x)
        if self.expand:
            # Not the sum rounded to half precision: every coordinate would feel the error.
            full = expand(wide)
            if _has_fast_layer_norm(full):
                return self._layer_norm(full, weight, bias).to(x.dtype)
            return self._scaled(full, full, _inverse_rms(full, self.eps), weight, bias).to(x.dtype)
        return self._scaled(x, wide, self._inverse(wide), weight, bias)

    def _inverse(self, wide: torch.Tensor) -> torch.Tensor:
        """1 / sqrt((Σx² + (Σx)²) / d + eps), [..., d - 1] → [..., 1]."""
        total = wide.sum(-1, keepdim=True)
        squares = _mean_square(wide, self.size, self.eps)
        return torch.addcmul(squares, total, total, value=1 / self.size).rsqrt()

    def extra_repr(self) -> str:
        return super().extra_repr() + (", expand=True" if self.expand else "")


class DeferredRMSNormLinear(nn.Module):
    """(W x) / sqrt(mean(x²) + eps) + c, [..., d] → [..., out], for a linear y = W x + c.

    FlashNorm's deferred 1/RMS (arXiv 2407.09577): a weightless RMSNorm before the linear, moved
    behind its product. In float16, W x can overflow where W · RMSNorm(x) does not.
    """

    def __init__(self, linear: nn.Linear, eps: float) -> None:
        super().__init__()
        self.linear, self.eps = linear, float(eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = F.linear(x, self.linear.weight)
        wide, inverse = _wide(product), _inverse_rms(_wide(x), self.eps)
        if self.linear.bias is None:
            return _scale_rows(product, wide, inverse)
        return (wide * inverse + self.linear.bias).to(product.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


def _wide(x: torch.Tensor) -> torch.Tensor:
    """x in float32 if it is in half precision, otherwise as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x²) + eps) over the last axis, [..., n] → [..., 1]."""
    return _mean_square(x, x.shape[-1], eps).rsqrt()


def _mean_square(x: torch.Tensor, size: int, eps: float) -> torch.Tensor:
    """Σx² / size + eps over the last axis, [..., n] → [..., 1].

    The norm squared again costs one number per row and saves the tensor x². On one row, as in
    decoding, the time goes into starting operations: addcmul does three in one.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(x.new_full((), eps), norm, norm, value=1 / size)


def _has_fast_layer_norm(x: torch.Tensor) -> bool:
    """Whether torch's LayerNorm may stand in for RMSNorm where the mean is zero.

    On the CPU it is one pass, RMSNorm is several. Never in float64, in which conversions are
    proven: a proof must see a real RMSNorm. Never with a gradient, from which LayerNorm would
    take the mean, forwards or backwards: training must not depend on the device. Never in
    torch.jit's trace, which is made with gradients and checked without.
    """
    compiling = is_compiling()
    seen = not compiling and (_traced() is not None or forward_ad._current_level >= 0)
    return x.is_cpu and x.dtype is not torch.float64 and not x.requires_grad and not seen


def _has_fused_rms_norm(norm: RMSNorm, x: torch.Tensor) -> bool:
    """Whether torch computes `norm` in one kernel: on a GPU, with a gain in the dtype of x."""
    gain, plain = norm.weight, norm.bias is None and not norm.offset
    return x.is_cuda and plain and (gain is None or gain.dtype is x.dtype)


def _scale_rows(x: torch.Tensor, wide: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """x · factor, [..., n] times [..., 1], rounded once; `wide` is x in float32 at least.

    In half precision the plain way makes a float32 tensor and rounds it, which for a long input
    takes most of the time. BatchNorm, with rows for channels, can do it in one pass.
    """
    if wide is x:
        return wide * factor
    trained = x.requires_grad and is_grad_enabled()  # its derivative would be rounded twice
    if not x.is_cpu or x.numel() < _MANY_NUMBERS or is_compiling() or trained:
        return (wide * factor).to(x.dtype)
    gain = factor.flatten()  # [rows], float32
    channels = x.reshape(1, gain.numel(), x.shape[-1])
    zero, one = torch.zeros_like(gain), torch.ones_like(gain)
    return F.batch_norm(channels, zero, one, weight=gain, eps=0.0).view(x.shape)


# The norms as one kernel for the CPU, where several torch operations would each take as long as
# torch's LayerNorm. It is compiled once, in half a second, and kept for the next process; where
# there is no C compiler, the torch operations above are what runs.

NUMBERS = r"""
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { LANES = 32 };  /* independent sums: no addition waits for the one before */

static void widen(const void *from, int64_t dtype, int64_t n, float *to) {
  const uint16_t *halves = from;
  int64_t i = 0;
  if (dtype == FLOAT32) {
    memcpy(to, from, n * sizeof *to);
  } else if (dtype == BFLOAT16) {
    for (; i < n; i++) {
      uint32_t bits = (uint32_t)halves[i] << 16;
      memcpy(to + i, &bits, sizeof bits);
    }
  } else {
#ifdef __F16C__
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(halves + i))));
#endif
    for (; i < n; i++) to[i] = ((const _Float16 *)from)[i];
  }
}

/* To nearest, ties to even. */
static void narrow(const float *from, int64_t dtype, int64_t n, void *to) {
  uint16_t *halves = to;
  int64_t i = 0;
  if (dtype == FLOAT32) {
    memcpy(to, from, n * sizeof *from);
  } else if (dtype == BFLOAT16) {
    for (; i < n; i++) {
      uint32_t bits;
      memcpy(&bits, from + i, sizeof bits);
      uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
      halves[i] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
    }
  } else {
#ifdef __F16C__
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128((__m128i *)(halves + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
    for (; i < n; i++) ((_Float16 *)to)[i] = (_Float16)from[i];
  }
}

/* The sum of x, and that of its squares. */
static void sums(const float *x, int64_t n, float *sum, float *squares) {
  float s[LANES] = {0}, q[LANES] = {0};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int lane = 0; lane < LANES; lane++) {
      s[lane] += x[i + lane];
      q[lane] += x[i + lane] * x[i + lane];
    }
  for (int lane = 0; i < n; i++, lane++) {
    s[lane] += x[i];
    q[lane] += x[i] * x[i];
  }
  for (int half = LANES / 2; half; half /= 2)
    for (int lane = 0; lane < half; lane++) {
      s[lane] += s[lane + half];
      q[lane] += q[lane + half];
    }
  *sum = s[0];
  *squares = q[0];
}
"""

_KERNEL = r"""
struct form {
  struct shape {
    int64_t n, used;      /* the coordinates of x, and of how many of them the sums are */
    int64_t size;         /* by which the sum of squares is divided: d */
    int64_t lacks, adds;  /* whether x lacks the last of d; whether y has it again */
    int64_t divided;      /* whether x was divided by its RMS before */
    double eps, offset;
  } shape;
  int64_t dtype, gain_dtype, bias_dtype, threads;
};

/* 1 / RMS of a row, or 1 if it was divided by it, and the sum of its numbers. */
static float inverse_rms(const struct form *form, const float *x, float *sum) {
  float squares;
  sums(x, form->shape.used, sum, &squares);
  if (form->shape.lacks) squares += *sum * *sum;
  if (form->shape.divided) return 1;
  return 1 / sqrtf(squares / form->shape.size + (float)form->shape.eps);
}

/* One row; `out` is where its numbers are made in float32, and may be `in`. */
static void row(const struct form *form, const float *in, float *out, const float *gain,
                const float *bias) {
  const int64_t n = form->shape.n;
  float sum;
  const float inverse = inverse_rms(form, in, &sum), offset = form->shape.offset;
  if (gain && bias)
    for (int64_t i = 0; i < n; i++) out[i] = in[i] * inverse * (offset + gain[i]) + bias[i];
  else if (gain)
    for (int64_t i = 0; i < n; i++) out[i] = in[i] * inverse * (offset + gain[i]);
  else if (bias)
    for (int64_t i = 0; i < n; i++) out[i] = in[i] * inverse + bias[i];
  else
    for (int64_t i = 0; i < n; i++) out[i] = in[i] * inverse;
  if (form->shape.adds)
    out[n] = -sum * inverse * (gain ? offset + gain[n] : 1) + (bias ? bias[n] : 0);
}

enum { APART = 32 };  /* numbers between the buffers of two threads: they share no cache line */

/* From one row to another; `buffer` has room for a row in float32. */
static void rows(const struct form *form, const char *x, char *y, const float *gain,
                 const float *bias, float *buffer, int64_t first, int64_t last) {
  const int64_t n = form->shape.n, wide = n + form->shape.adds, dtype = form->dtype;
  const int64_t bytes = dtype == FLOAT32 ? 4 : 2;
  for (int64_t i = first; i < last; i++) {
    const char *from = x + i * n * bytes;
    char *to = y + i * wide * bytes;
    if (dtype == FLOAT32) {
      row(form, (const float *)from, (float *)to, gain, bias);
    } else {
      widen(from, dtype, n, buffer);
      row(form, buffer, buffer, gain, bias);
      narrow(buffer, dtype, wide, to);
    }
  }
}

/* A gain or a bias in float32, `n` of it: as it lies there, or in `to`. */
static const float *factor(const void *from, int64_t dtype, int64_t n, float *to) {
  if (!from || dtype == FLOAT32) return from;
  widen(from, dtype, n, to);
  return to;
}

/* y = x / sqrt(sum of squares / size + eps) * (offset + gain) + bias, row by row, of `numbers` in
   x. A coordinate that x lacks is minus the sum of the others. Returns whether it was computed. */
static int norm_rows(const struct form *form, void *const *places, int64_t numbers) {
  void *x = places[0], *gain = places[1], *bias = places[2], *y = places[3];
  const int64_t n = form->shape.n, wide = n + form->shape.adds, buffer = wide + APART;
  const int64_t threads = form->threads, buffers = form->dtype == FLOAT32 ? 0 : threads;
  const int64_t count = numbers / n;
  const int64_t kept = buffers + (form->gain_dtype || form->bias_dtype ? 2 : 0);
  float *memory = kept ? malloc(kept * buffer * sizeof *memory) : 0;
  if (kept && !memory) return 0;
  const float *gains = factor(gain, form->gain_dtype, wide, memory + buffers * buffer);
  const float *biases = factor(bias, form->bias_dtype, wide, memory + (buffers + 1) * buffer);
  if (threads == 1) {
    rows(form, x, y, gains, biases, memory, 0, count);
  } else {
#pragma omp parallel for num_threads(threads)
    for (int64_t part = 0; part < threads; part++)
      rows(form, x, y, gains, biases, buffers ? memory + part * buffer : 0, count * part / threads,
           count * (part + 1) / threads);
  }
  free(memory);
  return 1;
}

/* The derivatives of `row`, where g is that of its output. With r for 1 / RMS, s for the sum of x
   and k = g * gain, less its last number where y has one more than x:

       d x = r * k - r^3 / size * (k . x) * (x, where it was used, + s, if x lacks a coordinate)

   Those of gain and bias, sums over the rows, are added to dfactors, if that is not 0. */
static void row_back(const struct form *form, const float *restrict x, const float *restrict g,
                     const float *restrict gain, float *restrict dx, float *restrict dfactors) {
  const struct shape *shape = &form->shape;
  const int64_t n = shape->n, used = shape->used, wide = n + shape->adds;
  const float last = shape->adds ? g[n] * gain[n] : 0;
  float sum, dots[LANES] = {0};
  const float inverse = inverse_rms(form, x, &sum);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int lane = 0; lane < LANES; lane++)
      dots[lane] += (g[i + lane] * gain[i + lane] - last) * x[i + lane];
  for (int lane = 0; i < n; i++, lane++) dots[lane] += (g[i] * gain[i] - last) * x[i];
  for (int half = LANES / 2; half; half /= 2)
    for (int lane = 0; lane < half; lane++) dots[lane] += dots[lane + half];
  const float slope = shape->divided ? 0 : dots[0] * inverse / shape->size * inverse * inverse;
  const float shift = shape->lacks ? sum : 0;
  float *restrict dbias = dfactors ? dfactors + wide : 0;
  for (i = 0; dfactors && i < n; i++) {
    dx[i] = (g[i] * gain[i] - last) * inverse - (x[i] + shift) * slope;
    dfactors[i] += g[i] * (x[i] * inverse);
    dbias[i] += g[i];
  }
  if (dfactors && shape->adds) dfactors[n] -= g[n] * (sum * inverse), dbias[n] += g[n];
  for (; i < n; i++) dx[i] = (g[i] * gain[i] - last) * inverse - (x[i] + shift) * slope;
  for (i = used; i < n; i++) dx[i] = g[i] * gain[i] * inverse;
}

enum { BLOCK = 64 };  /* rows whose sum is taken in float32; the blocks are added in double */

/* From one row to another. `totals` gets what is summed over the rows, unless it is 0; `room` is
   for five rows. */
static void rows_back(const struct form *form, const char *x, const char *g, const float *gain,
                      char *dx, double *totals, float *room, int64_t first, int64_t last) {
  const int64_t n = form->shape.n, wide = n + form->shape.adds, dtype = form->dtype;
  const int64_t bytes = dtype == FLOAT32 ? 4 : 2;
  float *block = room, *wide_x = room + 2 * wide, *wide_g = wide_x + wide, *made = wide_g + wide;
  for (int64_t i = 0; totals && i < 2 * wide; i++) totals[i] = 0;
  while (first < last) {
    const int64_t end = last - first < BLOCK ? last : first + BLOCK;
    memset(block, 0, 2 * wide * sizeof *block);
    for (; first < end; first++) {
      const char *from = x + first * n * bytes, *above = g + first * wide * bytes;
      char *to = dx + first * n * bytes;
      if (dtype == FLOAT32) {
        row_back(form, (const float *)from, (const float *)above, gain, (float *)to,
                 totals ? block : 0);
      } else {
        widen(from, dtype, n, wide_x);
        widen(above, dtype, wide, wide_g);
        row_back(form, wide_x, wide_g, gain, made, totals ? block : 0);
        narrow(made, dtype, n, to);
      }
    }
    for (int64_t i = 0; totals && i < 2 * wide; i++) totals[i] += block[i];
  }
}

/* The derivatives of `norm`, by x, and by gain and bias unless their places are 0. The same number
   of threads gives the same bits. Returns whether they were computed. */
static int norm_back_rows(const struct form *form, void *const *places, int64_t numbers) {
  const void *x = places[0], *g = places[1], *gain = places[2];
  void *dx = places[3], *dgain = places[4], *dbias = places[5];
  const int64_t n = form->shape.n, wide = n + form->shape.adds, threads = form->threads;
  const int64_t count = numbers / n, doubles = 2 * wide + APART, floats = 5 * wide + APART;
  double *totals = malloc(threads * (doubles * sizeof *totals + floats * sizeof(float)) +
                          wide * sizeof(float));
  if (!totals) return 0;
  float *room = (float *)(totals + threads * doubles), *gains = room + threads * floats;
  if (gain) widen(gain, form->gain_dtype, wide, gains);
  for (int64_t i = 0; i < wide; i++) gains[i] = gain ? form->shape.offset + gains[i] : 1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < threads; part++)
    rows_back(form, x, g, gains, dx, dgain || dbias ? totals + part * doubles : 0,
              room + part * floats, count * part / threads, count * (part + 1) / threads);
  if (dgain || dbias) {
    for (int64_t part = 1; part < threads; part++)
      for (int64_t i = 0; i < 2 * wide; i++) totals[i] += totals[part * doubles + i];
    for (int64_t i = 0; i < 2 * wide; i++) room[i] = totals[i];
    if (dgain) narrow(room, form->gain_dtype, wide, dgain);
    if (dbias) narrow(room + wide, form->bias_dtype, wide, dbias);
  }
  free(totals);
  return 1;
}

/* Both as functions of Python, of what is in a form, of addresses, and of the number of numbers:
   calling them by ctypes would take longer than the norm of a row. These are parts of Python's
   stable ABI, so one library is for every version, and no header is needed. */
extern long long PyLong_AsLongLong(void *);
extern char *PyBytes_AsString(void *);
extern void *PyBool_FromLong(long), *PyEval_SaveThread(void), PyEval_RestoreThread(void *);

static void *call(int (*function)(const struct form *, void *const *, int64_t),
                  void *const *given, int64_t count) {
  int64_t numbers[13];
  for (int64_t i = 1; i < count; i++) numbers[i] = PyLong_AsLongLong(given[i]);
  const struct form form = {*(const struct shape *)PyBytes_AsString(given[0]), numbers[2],
                            numbers[3], numbers[4], numbers[5]};
  const int64_t n = form.shape.n, known = form.dtype | form.gain_dtype | form.bias_dtype;
  if (known < 0 || n == 0 || n != numbers[1]) return PyBool_FromLong(0);
  void *thread = PyEval_SaveThread();
  const int done = function(&form, (void *const *)(numbers + 6), numbers[count - 1]);
  PyEval_RestoreThread(thread);
  return PyBool_FromLong(done);
}

struct method { const char *name; void *(*call)(void *, void *const *, int64_t);
                int fastcall; const char *text; };
#define METHOD(name) \
  static void *call_##name(void *self, void *const *given, int64_t count) { \
    return call(name##_rows, given, count); \
  } \
  struct method name = {#name, call_##name, 0x80, 0};
METHOD(norm) METHOD(norm_back)
"""
NARROW = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as the kernel numbers them
_DIGEST = hashlib.sha256().digest_size
ONE_THREAD = 2**15  # fewer numbers are not worth another thread
_PLAIN = (torch.Tensor, nn.Parameter)

# Looked up once: on one row, what is asked of x takes longer than its norm.
_modes, _included, _traced, transforms = (
    torch._C._len_torch_dispatch_stack,
    torch._C._dispatch_tls_is_dispatch_key_included,
    torch._C._get_tracing_state,
    torch._C._are_functorch_transforms_active,
)


_BEFORE_DISPATCH = torch._C.DispatchKey.PreDispatch  # for modes that see more than the others


def watched() -> bool:
    """Whether somebody needs to see the operations: a mode, forward derivatives, a trace."""
    modes = bool(_modes()) or _included(_BEFORE_DISPATCH)
    return modes or forward_ad._current_level >= 0 or _traced() is not None


def address(x: torch.Tensor) -> int:
    """Where the kernel may read x behind torch's back, row by row; 0 if it may not.

    It may on the CPU if x is a plain tensor of plain numbers. Those that only stand for others,
    in a transformation of functions for one, have no address.
    """
    if type(x) not in _PLAIN or not x.is_cpu or x.is_nested or x.is_neg():
        return 0
    try:
        return x.data_ptr() if x.is_contiguous() else 0
    except RuntimeError:
        return 0


def _address_and_dtype(factor: Factor, size: int) -> tuple[int, int]:
    """The address of a gain or a bias of this size, and its dtype: -1 if it cannot be read."""
    if factor is None:
        return 0, 0
    at = address(factor) if factor.numel() == size else 0
    return at, NARROW.get(factor.dtype, -1) if at else -1


class _Differentiable(torch.autograd.Function):
    """A norm by the kernel whose derivatives are the kernel's; theirs are of operations."""

    @staticmethod
    def forward(ctx: Any, told: tuple[Any, ...], *given: Factor) -> torch.Tensor:
        """The norm of x, which is told: as an argument by itself it would make y a view of it."""
        ctx.norm, ctx.form, y = told
        ctx.save_for_backward(*given)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[Any, ...]:
        """By operations if it is to be differentiated, or where the kernel must keep out."""
        again, (_, *wanted) = is_grad_enabled(), ctx.needs_input_grad
        if not again and (found := _derivatives(ctx, g.contiguous(), wanted)) is not None:
            return None, *found
        with torch.enable_grad():
            # Views: a derivative by x itself would go on to what x was made of.
            seen = [None if each is None else each.view_as(each) for each in ctx.saved_tensors]
            y = ctx.norm._operations(*seen)
        sources = [each for each, want in zip(seen, wanted, strict=True) if want]
        rest = iter(torch.autograd.grad(y, sources, g, create_graph=again))  # type: ignore[arg-type]
        return None, *(next(rest) if want else None for want in wanted)


# Without what `apply` does for transformations, which are none here, and which takes 7 µs.
_differentiable = super(torch.autograd.Function, _Differentiable).apply


def _derivatives(ctx: Any, g: torch.Tensor, wanted: Sequence[bool]) -> list[Factor] | None:
    """Of x, weight and bias; None if the kernel must keep out: hooks may save something else."""
    if is_compiling() or watched() or not (above := address(g)):
        return None
    saved, (_, n, *dtypes, _), wide = ctx.saved_tensors, ctx.form, ctx.norm._wide
    numbers = g.numel() // wide * n
    sizes = (numbers, wide, wide)
    given = [_address_and_dtype(each, size) for each, size in zip(saved, sizes, strict=True)]
    if [dtype for _, dtype in given] != dtypes:
        return None
    found = [
        torch.empty_like(each) if each is not None and (want or each is saved[0]) else None
        for each, want in zip(saved, wanted, strict=True)
    ]
    at, gain = given[0][0], given[1][0]
    made = [0 if each is None else each.data_ptr() for each in found]
    kernel: Any = _kernel()
    return found if kernel.norm_back(*ctx.form, at, above, gain, *made, numbers) else None


@cache
def _kernel() -> ctypes.CDLL | None:
    """The compiled kernel; None where it cannot be had."""
    if (found := library(NUMBERS + _KERNEL)) is not None:
        prototype = ctypes.PYFUNCTYPE(ctypes.py_object, *[ctypes.c_void_p] * 3)
        function = prototype(("PyCFunction_NewEx", ctypes.pythonapi))
        for name in ("norm", "norm_back"):
            method = ctypes.addressof(ctypes.c_char.in_dll(found, name))
            setattr(found, name, function(method, None, None))
    return found


def library(source: str) -> ctypes.CDLL | None:
    """What the C compiler makes of `source`, or made once; None where that cannot be had."""
    x86 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    flags = ["-O3", "-std=gnu11", "-fPIC", "-fopenmp", *(["-march=x86-64-v3"] if x86 else [])]
    made_of = "\0".join([source, platform.machine(), *flags])
    key = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    kept = caches / "normconvert" / f"norm-{key}.so"
    try:
        return (_kept(kept) if caches.is_absolute() else None) or _compiled(source, flags, kept)
    except (OSError, subprocess.CalledProcessError):
        return None


def _kept(path: Path) -> ctypes.CDLL | None:
    """The kernel that `_keep` left there. A damaged one would end the process, so it is summed."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    whole = hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]
    return ctypes.CDLL(str(path)) if whole else None


def _keep(library: str, path: Path) -> None:
    """Leave the kernel for the next process, with a checksum behind it; or do not, if it fails."""
    content = Path(library).read_bytes()
    draft = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, draft = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with open(number, "wb") as file:
            file.write(content + hashlib.sha256(content).digest())
        os.replace(draft, path)
    except OSError:
        with suppress(OSError):
            os.unlink(draft)


def _compiled(source: str, flags: list[str], kept: Path) -> ctypes.CDLL:
    """A library, fresh from the compiler, and kept as the file `kept`, if its place is known.

    It is linked without OpenMP: so it takes the threads of torch, whose library is loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        code, objects, library = (str(Path(folder, f"norm.{end}")) for end in ("c", "o", "so"))
        Path(code).write_text(source)
        for command in (
            ["cc", *flags, "-c", code, "-o", objects],
            ["cc", "-shared", objects, "-o", library, "-lm"],
        ):
            subprocess.run(command, check=True, capture_output=True)
        loaded = ctypes.CDLL(library)
        if kept.is_absolute():
            _keep(library, kept)
        return loaded


# Converted models. The part above is the norms; this part puts them into a stock model.

MODEL_TYPE = "normconvert"
PREFIX = "Normconvert"
# Where a stock class that is given such a checkpoint looks for the weights, and finds none: it
# would fill the missing norms and drop the added biases.
NOT_FOR_STOCK_CLASSES = "load-it-with-AutoModelForCausalLM-and-trust_remote_code.safetensors"

_SIZES = (  # the attributes in which layers remember the shape of their weight
    (nn.Linear, ("out_features", "in_features")),
    (nn.Embedding, ("num_embeddings", "embedding_dim")),
    (Conv1D, ("nx", "nf")),
    (nn.modules.conv._ConvNd, ("out_channels",)),
)

# Where transformers finds what goes with a model, if the files beside it do not say.
_COMPANIONS = (
    "TOKENIZER_MAPPING",
    "PROCESSOR_MAPPING",
    "FEATURE_EXTRACTOR_MAPPING",
    "IMAGE_PROCESSOR_MAPPING",
    "VIDEO_PROCESSOR_MAPPING",
)


class NormconvertConfig(PreTrainedConfig):  # type: ignore[misc]
    """config.json of a converted checkpoint: that of its stock model, and what was changed.

    On disk its model_type is ``normconvert``, so that whatever does not know it refuses to load
    the weights. In memory it is a configuration of the stock type with the attribute
    `normconvert`, so that whatever goes by the type (names on disk, masks, tokenizers) still works.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration, with what belongs to it registered for the Auto classes."""
        changes = config_dict[MODEL_TYPE]
        stock = CONFIG_MAPPING[changes["stock"]]
        config_class = converted_config_class(stock)
        found = config_class.from_dict(config_dict, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        for name in changes["auto_classes"]:
            getattr(transformers, name).register(config_class, model_class(config), exist_ok=True)
        for name in _COMPANIONS:  # one whose requirements are not installed is no mapping
            mapping = getattr(transformers, name)
            if isinstance(mapping, dict) and stock in mapping:
                cast("Any", mapping).register(config_class, mapping[stock], exist_ok=True)
        return found


class _ConvertedConfig:
    """What a converted configuration does other than its stock class."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `AutoConfig` does it: transformers would look for a part of the file of the type."""
        return NormconvertConfig.from_pretrained(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        names = config_dict.get("architectures") or []
        stock = {
            "architectures": [name.removeprefix(PREFIX) for name in names],
            "model_type": config_dict[MODEL_TYPE]["stock"],
            "transformers_weights": None,
        }
        return super().from_dict({**config_dict, **stock}, **kwargs)  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {
            **found,
            "architectures": [PREFIX + name for name in found.get("architectures") or []],
            "model_type": MODEL_TYPE,
            "transformers_weights": NOT_FOR_STOCK_CLASSES,
        }

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the configuration, and this file with it. Saving a model comes here, too."""
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        shutil.copyfile(__file__, Path(save_directory, f"modeling_{MODEL_TYPE}.py"))


class _ConvertedModel:
    """What a converted model does other than its stock class."""

    config: Any

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: what transformers does with the stock class's weights, it must do with these."""
        return False

    def post_init(self) -> None:
        model: Any = self
        change_modules(model, self.config.normconvert)
        for part in model.children():
            if hasattr(part, "all_tied_weights_keys"):
                part.all_tied_weights_keys = _existing(part, part.all_tied_weights_keys)
        super().post_init()  # type: ignore[misc]

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As the stock class does it; a configuration that is saved has to know the new shapes."""
        model: Any = self
        found: nn.Module = super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]
        for name, shape in self.config.normconvert["shapes"].items():
            shape[:] = model.get_parameter(name).shape
        return found

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        found = super().get_expanded_tied_weights_keys(all_submodels)  # type: ignore[misc]
        return _existing(cast("nn.Module", self), found)


def _existing(model: nn.Module, tied: dict[str, str]) -> dict[str, str]:
    """Of the tied weights those that exist: shared blocks are tied by gains that may be gone."""
    names = {*model.state_dict()}
    return {target: source for target, source in tied.items() if {target, source} <= names}


@cache
def converted_config_class(stock: type[Any]) -> type[Any]:
    return type(PREFIX + stock.__name__, (_ConvertedConfig, stock), {"__module__": __name__})


@cache
def _model_class(stock: type[Any], config_class: type[Any]) -> type[Any]:
    """Named as the stock class, because transformers knows some conversions by that name."""
    attributes = {"__module__": __name__, "config_class": config_class}
    return type(stock.__name__, (_ConvertedModel, stock), attributes)


def model_class(config: Any) -> type[Any]:
    """The class of the model that `config`, of a converted checkpoint, describes."""
    stock: type[Any] = getattr(transformers, config.architectures[0])
    return _model_class(stock, type(config))  # type: ignore[arg-type]


if not TYPE_CHECKING:  # which a function for all names would end

    def __getattr__(name: str) -> type[Any]:
        """A converted class by its name: where pickle looks for it."""
        stock = getattr(transformers, name.removeprefix(PREFIX), None)
        if isinstance(stock, type) and issubclass(stock, PreTrainedConfig):
            return converted_config_class(stock)
        if isinstance(getattr(stock, "config_class", None), type):
            return _model_class(stock, converted_config_class(stock.config_class))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def change_modules(model: nn.Module, changes: dict[str, Any]) -> None:
    """Put the norms in, resize the weights, add the biases and the recenterings."""
    for spec in changes["norms"]:
        norm: Any = _norm(**spec)
        # Neutral as it is made; the stock code would need a gain, or would not know of 1 + w.
        norm._is_hf_initialized = norm.weight is None or not norm.weight.is_meta
        model.set_submodule(spec["module"], norm)
        if isinstance(norm, _LateCRMSNorm):
            path, _, at = spec["reader"].partition(" ")
            _alter(model.get_submodule(path), at, partial(norm, late=True))
    for name, shape in changes["shapes"].items():
        _resize(model, name, shape)
    for name in changes["biases"]:
        path, _, attribute = name.rpartition(".")
        linear: Any = model.get_submodule(path)
        setattr(linear, attribute, nn.Parameter(linear.weight.new_zeros(linear.weight.shape[0])))
    for each in changes["full_width"]:
        module = model.get_submodule(each["module"])
        if each.get("at"):
            _alter(module, each["at"], expand)
        _alter(module, "output", compress)
    for each in changes["recenterings"]:
        change = compress if each.get("compress") else recenter
        _alter(model.get_submodule(each["module"]), each["at"], change)


class _LateCRMSNorm(CRMSNorm):
    """A CRMSNorm whose output is expanded, and gets gain and bias, by a `late` second call.

    In a call accelerate lends it weights that are elsewhere: [..., d - 1], late → [..., d].
    """

    def __init__(self, size: int, eps: float, **options: Any) -> None:
        super().__init__(size, eps, **options)
        self._set_shape(used=size - 1, lacks=True, adds=True, divided=True)
        self.first = (CRMSNorm(size, eps),)  # which is no part of the model

    def forward(self, x: torch.Tensor, late: bool = False) -> torch.Tensor:
        return super().forward(x) if late else self.first[0].forward(x)

    def _operations(self, x: torch.Tensor, weight: Factor, bias: Factor) -> torch.Tensor:
        full = expand(_wide(x))
        return self._scaled(full, full, torch.ones_like(full[..., :1]), weight, bias).to(x.dtype)


def _norm(
    module: str,
    kind: str,
    size: int,
    eps: float,
    fraction: float = 1.0,
    reader: str = "",
    **options: Any,
) -> nn.Module:
    if kind == "rmsnorm":
        return RMSNorm(size, eps, **{"gain": False, **options})
    if kind == "crmsnorm":
        return (_LateCRMSNorm if reader else CRMSNorm)(size, eps, **options)
    if kind == "prmsnorm":
        return PartialRMSNorm(size, eps, fraction, **{"gain": False, **options})
    if kind == "layernorm" and not options:
        return nn.LayerNorm(size, eps, elementwise_affine=False)
    raise ValueError(f"{module} is to be a {kind!r}, which this file does not know")


def _resize(model: nn.Module, name: str, shape: list[int]) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    before = getattr(module, attribute)
    setattr(module, attribute, nn.Parameter(before.new_empty(shape), before.requires_grad))
    module._is_hf_initialized = False  # type: ignore[assignment]
    if attribute == "weight":
        set_sizes(module, shape)


def set_sizes(module: nn.Module, shape: Sequence[int]) -> None:
    """Tell a layer the shape of its weight, where it remembers that."""
    for kind, sizes in _SIZES:
        if isinstance(module, kind):
            for size, value in zip(sizes, shape, strict=False):
                setattr(module, size, value)


def _alter(module: nn.Module, at: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the `output` of a module, or its `input KEY`.

    By hooks that can be copied and pickled: those of a copy use the norms of the copy.
    """
    if at == "output":
        module.register_forward_hook(partial(_change_output, change))
    else:
        before = partial(_change_input, change, at.removeprefix("input "))
        module.register_forward_pre_hook(before, with_kwargs=True)


def _change_output(
    change: Callable[[torch.Tensor], torch.Tensor], _: nn.Module, args: Any, output: torch.Tensor
) -> torch.Tensor:
    return change(output)


def _change_input(
    change: Callable[[torch.Tensor], torch.Tensor],
    key: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if key in kwargs:
        return args, {**kwargs, key: change(kwargs[key])}
    if not key.isdigit():
        raise ValueError(f"the converted {type(module).__name__} takes no other input than {key}")
    place = int(key)
    return (*args[:place], change(args[place]), *args[place + 1 :]), kwargs
