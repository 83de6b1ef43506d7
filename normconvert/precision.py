"""Exact arithmetic where a model insists on less: every float32 cast becomes float64.

Most norms, softmaxes and rotary embeddings cast to float32 on purpose. To compare functions,
not roundings, both the norm probe and the verification run models under `Float64`.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

_NARROW = (torch.float32, torch.bfloat16, torch.float16)


class _Widen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces every narrower floating dtype that an operator is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return func(*map(_widened, args), **given)


def _widened(argument: object) -> object:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in _NARROW else argument


def computing_in(dtype: torch.dtype) -> AbstractContextManager[None]:
    """Where a model of `dtype` computes: in float64 without exceptions, else as it likes."""
    return float64() if dtype is torch.float64 else nullcontext()


@contextmanager
def float64() -> Iterator[None]:
    """Inside, operators that are asked for a narrower floating dtype compute in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widen():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.set_default_dtype(before)
