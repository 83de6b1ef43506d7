"""Modules that a model's code names by a number out of a tensor, such as f"expert_{index}"."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def readable_numbers() -> Iterator[None]:
    """Inside, a fake integer prints as its number, as a real one does, and so reads its data."""
    before = FakeTensor.__format__
    FakeTensor.__format__ = _format  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        FakeTensor.__format__ = before  # type: ignore[method-assign]


def _format(tensor: FakeTensor, spec: str) -> str:
    if tensor.ndim == 0 and not (tensor.is_floating_point() or tensor.is_complex()):
        return format(int(tensor.item()), spec)
    return object.__format__(tensor, spec)
