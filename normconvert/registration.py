"""Making transformers know the native format and our models, without importing it for that."""

from __future__ import annotations

import sys
import threading
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_PACKAGE = "transformers"
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


class _Progress(threading.local):
    """How deep this thread is in imports of transformers, and what is to follow them."""

    depth = 0

    def __init__(self) -> None:
        self.followers: list[str] = []


class _Finder(MetaPathFinder):
    """Finds transformers' modules as Python itself would, and has them loaded by `_Loader`."""

    def __init__(self) -> None:
        self._progress = _Progress()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != _PACKAGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._progress)
        return spec


class _Loader(Loader):
    """Loads a module, and after the outermost one those that follow what it has imported.

    Not sooner: our modules import what may be only half there, as transformers' modules import
    one another in circles.
    """

    def __init__(self, loader: Loader, progress: _Progress) -> None:
        self._loader, self._progress = loader, progress

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        name, progress = module.__spec__.name, self._progress
        # From here on nothing is other than Python made it; transformers replaces its packages.
        module.__spec__.loader = module.__loader__ = self._loader
        progress.depth += 1
        try:
            self._loader.exec_module(module)
        finally:
            progress.depth -= 1
        progress.followers += _FOLLOWERS.get(name, ())
        if progress.depth == 0:
            followers, progress.followers = progress.followers, []
            _import(followers)
