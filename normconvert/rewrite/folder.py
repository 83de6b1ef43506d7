"""The output folder: built beside its final place, renamed when complete, or never seen."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from normconvert.errors import NormconvertError, RewriteError

if TYPE_CHECKING:
    from collections.abc import Iterator

_MARK = ".normconvert-"  # .NAME.normconvert-PID is a conversion into NAME by that process


@dataclass(frozen=True, slots=True)
class Staged:
    """A folder being built at `path`, to become `output`."""

    path: Path
    output: Path

    def commit(self) -> None:
        """Make the folder appear under its final name, in place of an older output.

        Raises:
            RewriteError: the rename is not possible; an older output is still there.
        """
        try:
            _sync(self.path)
            old = self.path.with_name(self.path.name + "-old")
            if self.output.exists():
                self.output.rename(old)
            try:
                self.path.rename(self.output)
            except OSError:
                if old.exists():
                    old.rename(self.output)
                raise
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise cannot_write(self.output, error) from error


def check_output(output: Path, source: Path, *, force: bool) -> None:
    """Refuse, before any work, an output that cannot or must not be written.

    Raises:
        RewriteError: it exists and `force` is not set, it is no checkpoint, or it and the
            source contain each other.
    """
    here, there = output.resolve(), source.resolve()
    if here == there or there in here.parents or here in there.parents:
        raise RewriteError(
            f"The output {output} and the source {source} lie in each other; give another "
            "folder with --output."
        )
    if not output.exists():
        return
    if not force:
        raise RewriteError(f"{output} exists; give --force to replace it, or another --output.")
    if not (output / "config.json").is_file():
        raise RewriteError(
            f"{output} exists and is not a checkpoint; --force does not replace it. Remove it, "
            "or give another --output."
        )


@contextmanager
def stage(output: Path) -> Iterator[Staged]:
    """A new folder beside `output`; removed at the end unless it was committed.

    What killed runs left behind beside `output` is removed, or put back if it is the older
    output itself.

    Raises:
        RewriteError: the place cannot be written.
    """
    path = output.with_name(f".{output.name}{_MARK}{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _clean(output)
        path.mkdir()
    except OSError as error:
        raise cannot_write(output, error) from error
    try:
        yield Staged(path, output)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def cannot_write(path: Path, error: OSError) -> NormconvertError:
    """One sentence for an operating system's error while writing under `path`."""
    return RewriteError(f"{path} cannot be written: {error.strerror or error}.")


def _clean(output: Path) -> None:
    pattern = re.compile(re.escape(f".{output.name}{_MARK}") + r"(\d+)(-old)?")
    for path in output.parent.iterdir():
        found = pattern.fullmatch(path.name)
        if found is None or _alive(int(found[1])):
            continue
        if found[2] and not output.exists():
            path.rename(output)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sync(folder: Path) -> None:
    """Have every file on the disk before the folder gets its name."""
    for root, _, names in os.walk(folder):
        for name in (*names, "."):
            file = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)
