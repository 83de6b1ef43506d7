"""What a norm is, decided by what it computes.

A module is run alone, in float64, on random input with random parameters, and its output is
compared with LayerNorm and RMSNorm, with every convention for gain and bias. Names play no part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch.func import functional_call
from torch.utils._python_dispatch import _disable_current_modes

from normconvert.precision import float64
from normconvert.torch_threads import torch_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from normconvert.ir.graph import NormKind

Values: TypeAlias = "dict[str, torch.Tensor]"
Run: TypeAlias = "Callable[[Values, torch.Tensor], torch.Tensor | None]"

_TOLERANCE = 1e-10
_LARGE, _TINY = 1e6, 1e-20  # input scales at which epsilon vanishes, and at which it is all


@dataclass(frozen=True, slots=True, kw_only=True)
class Formula:
    """What a module computes; see `normconvert.ir.graph.Norm`. Names are of its parameters."""

    kind: NormKind
    gain: str | None
    bias: str | None
    offset: float
    eps: float


def recognise(module: torch.nn.Module, shape: tuple[int, ...]) -> Formula | None:
    """The norm that `module` computes on input of `shape`, or None if it is none.

    `shape` is that of its real input: what depends on a position shows only there.
    A module with submodules, buffers or a parameter that does not fit the last axes is none.
    """
    parameters = dict(module.named_parameters())
    if not _could_be_norm(module, parameters, shape):
        return None
    generator = torch.Generator().manual_seed(0)
    # So little is done sooner than several threads have come together for it.
    with _disable_current_modes(), torch.no_grad(), torch_threads(1):
        # Far from one, of both signs: a bound or an absolute value must show.
        values = {name: _spread(p.shape, generator) for name, p in parameters.items()}
        x = _spread(shape, generator)

        def run(values: Values, x: torch.Tensor) -> torch.Tensor | None:
            return _run(module, values, x)

        return _match(run, values, x) or _unrecognised(run, values, x)


def _spread(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Numbers of many sizes, 0.01 to 100 for the most part; more are positive than negative."""
    size = torch.randn(shape, dtype=torch.float64, generator=generator).mul_(2).exp_()
    negative = torch.rand(shape, generator=generator) < 0.3
    return torch.where(negative, -size, size)


def _could_be_norm(
    module: torch.nn.Module, parameters: dict[str, torch.nn.Parameter], shape: tuple[int, ...]
) -> bool:
    return (
        next(module.children(), None) is None
        and next(module.buffers(), None) is None
        and len(parameters) <= 2
        and len(shape) >= 2
        and shape[-1] > 1
        and all(
            1 <= p.ndim < len(shape) and p.shape == shape[-p.ndim :] for p in parameters.values()
        )
    )


def _run(module: torch.nn.Module, values: Values, x: torch.Tensor) -> torch.Tensor | None:
    before = x.clone()
    try:
        with float64():
            out = functional_call(module, values, (x,))
    except Exception:  # whatever a foreign module raises on one plain tensor: it is not a norm
        return None
    same = isinstance(out, torch.Tensor) and out.shape == x.shape and torch.equal(x, before)
    return out if same and out.isfinite().all() else None


def _match(run: Run, values: Values, x: torch.Tensor) -> Formula | None:
    """The formula that the module follows at every scale of its input."""
    out = run(values, x * _LARGE)
    if out is None:
        return None
    for candidate in _candidates(values):
        if _close(_expected(candidate, values, x * _LARGE), out):
            formula = replace(candidate, eps=_eps(candidate, run, values, x * _TINY))
            scales = (_TINY, formula.eps**0.5, 1.0)
            if all(_agrees(formula, run, values, x * scale) for scale in scales):
                return formula
    return None


def _agrees(formula: Formula, run: Run, values: Values, x: torch.Tensor) -> bool:
    out = run(values, x)
    return bool((x == 0).all()) or (out is not None and _close(_expected(formula, values, x), out))


def _candidates(values: Values) -> Iterator[Formula]:
    kinds: tuple[NormKind, ...] = ("rmsnorm", "layernorm")
    for kind in kinds:
        for gain, bias in dict.fromkeys(permutations((*values, None, None), 2)):
            if sum(name is not None for name in (gain, bias)) != len(values):
                continue
            for offset in (0.0, 1.0) if gain else (1.0,):
                yield Formula(kind=kind, gain=gain, bias=bias, offset=offset, eps=0.0)


def _expected(formula: Formula, values: Values, x: torch.Tensor) -> torch.Tensor:
    if formula.kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    out = x * (x.square().mean(-1, keepdim=True) + formula.eps).rsqrt()
    if formula.gain is not None:
        out = out * (formula.offset + values[formula.gain])
    return out if formula.bias is None else out + values[formula.bias]


def _eps(formula: Formula, run: Run, values: Values, x: torch.Tensor) -> float:
    """The epsilon, read off where the input `x` is next to nothing: there it is all there is.

    Without its bias the norm is then (centered) x · gain / sqrt(eps).
    """
    if formula.bias is not None:
        values = {**values, formula.bias: torch.zeros_like(values[formula.bias])}
    out, without_eps = run(values, x), _expected(formula, values, x)
    if out is None or _close(without_eps, out):
        return 0.0
    linear = without_eps * _rms(formula, x)
    return float(f"{float(linear.abs().sum() / out.abs().sum()) ** 2:.10g}")


def _rms(formula: Formula, x: torch.Tensor) -> torch.Tensor:
    if formula.kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    return x.square().mean(-1, keepdim=True).sqrt()


def _close(expected: torch.Tensor, out: torch.Tensor) -> bool:
    return bool((expected - out).abs().max() <= _TOLERANCE * out.abs().max())


def _unrecognised(run: Run, values: Values, x: torch.Tensor) -> Formula | None:
    """A norm by its character, if by no formula: the scale of its input does not matter."""
    one, two = run(values, x * _LARGE), run(values, 2 * x * _LARGE)
    other = run(values, x.flip(-1) * _LARGE)
    if not values or one is None or two is None or other is None:
        return None
    if not _close(one, two) or _close(one, other):
        return None
    return Formula(kind="unrecognised", gain=None, bias=None, offset=0.0, eps=0.0)
