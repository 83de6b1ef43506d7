"""Making transformers know the native format and our models, without importing it for that."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_FOLLOWERS = {
    "transformers.models.auto.configuration_auto": (
        "normconvert.nn",
        "normconvert.models.openelm_config",
    ),
    "transformers.models.auto.modeling_auto": ("normconvert.models.openelm",),
}
"""Modules of transformers by which it decides on classes, and ours that register with them."""


def register() -> None:
    """Register now, or as soon as transformers' Auto classes are imported."""
    for module, followers in _FOLLOWERS.items():
        if module in sys.modules:
            _import(followers)
    sys.meta_path.insert(0, _Finder())


def _import(modules: Sequence[str]) -> None:
    for module in modules:
        import_module(module)


class _Finder(MetaPathFinder):
    """Finds those modules as Python itself would, and has them loaded by `_Loader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _FOLLOWERS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, _FOLLOWERS[fullname])
        return spec


class _Loader(Loader):
    """Loads a module and then those that follow it."""

    def __init__(self, loader: Loader, followers: Sequence[str]) -> None:
        self._loader, self._followers = loader, followers

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _import(self._followers)
