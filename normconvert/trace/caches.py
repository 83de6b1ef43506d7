"""Functions of a model's code that remember their results, and must not remember fake tensors."""

from __future__ import annotations

import inspect
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


@contextmanager
def forgetting(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the code of `model` finds its `lru_cache`s empty; afterwards they are so again.

    A table of positions that was computed on fake tensors would else serve the next real model.
    """
    _forget(model)
    try:
        yield
    finally:
        _forget(model)


def _forget(model: torch.nn.Module) -> None:
    for name in {type(module).__module__ for module in model.modules()}:
        for function in _functions(sys.modules[name]):
            for cached in (function, *_closed_over(function)):
                if hasattr(cached, "cache_clear"):
                    cached.cache_clear()


def _functions(module: Any) -> Iterator[Any]:
    """The functions and methods that are defined in `module`."""
    for value in vars(module).values():
        if getattr(value, "__module__", None) == module.__name__:
            yield from vars(value).values() if inspect.isclass(value) else (value,)


def _closed_over(function: Any) -> Iterator[Any]:
    """What a decorated function keeps to itself, as transformers' own cache does."""
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # not bound yet
            yield cell.cell_contents
