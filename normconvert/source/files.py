"""The files of a checkpoint's folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_LEFT_OUT = frozenset({".git", ".cache"})  # of a clone or a download, not of the checkpoint


def walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder of the checkpoint in `folder`, that one first, and the names of its files.

    Links to folders are followed, but not to one that they are in.
    """
    for root, folders, names in os.walk(folder, followlinks=True):
        above = {os.path.realpath(part) for part in (Path(root), *Path(root).parents)}
        folders[:] = [
            name
            for name in folders
            if name not in _LEFT_OUT and os.path.realpath(os.path.join(root, name)) not in above
        ]
        yield Path(root), names
