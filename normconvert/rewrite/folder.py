"""The output folder: built beside its final place, renamed when complete, or never seen."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import signal
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from normconvert.errors import NormconvertError, RewriteError, SourceError
from normconvert.source.checkpoint import read_json

if TYPE_CHECKING:
    from collections.abc import Iterator

MANIFEST = "normconvert.json"
"""What tells of the conversion, in every output."""

_STAGED = re.compile(r"\.(?P<name>.+)\.normconvert-(?P<process>\d+)-[0-9a-f]+(?P<old>-old)?")
"""A conversion into NAME by that process, or the older output that it is about to replace."""
_OLD = "-old"
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True, slots=True)
class Staged:
    """A folder being built at `path`, to become `output`."""

    path: Path
    output: Path
    force: bool

    def commit(self) -> None:
        """Make the folder appear under its final name, with `force` in place of an older output.

        Raises:
            RewriteError: the rename is not possible; what had the name still has it.
        """
        try:
            _sync(self.path)
        except OSError as error:
            raise cannot_write(self.output, error) from error
        old = self.path.with_name(self.path.name + _OLD)
        with _undisturbed():
            try:
                if self.output.exists():  # now, whatever was there in the beginning
                    _require_replaceable(self.output, force=self.force)
                    self.output.rename(old)
                self.path.rename(self.output)
            except OSError as error:
                raise self._not_renamed(old, error) from error
            shutil.rmtree(old, ignore_errors=True)

    def _not_renamed(self, old: Path, error: OSError) -> NormconvertError:
        """One sentence, after putting back the older output if it was moved to `old`."""
        kept = ""
        if old.exists():
            try:
                old.rename(self.output)
            except OSError:  # then the next run into this output will
                kept = f" The older output is {old}."
        return RewriteError(
            f"{self.output} cannot be put in its place: no folder can be renamed there "
            f"({error.strerror or error}).{kept} Give an --output on another file system."
        )


def check_output(output: Path, source: Path, *, force: bool) -> None:
    """Refuse, before any work, an output that cannot or must not be written.

    Raises:
        RewriteError: it exists and `force` is not set, it holds anything but an earlier
            conversion, or it and the source contain each other.
    """
    here, there = output.resolve(), source.resolve()
    place = next(folder for folder in here.parents if folder.exists())
    if source.is_dir() and (here == there or there in here.parents or here in there.parents):
        how = "is" if here == there else "lies in" if there in here.parents else "holds"
        raise RewriteError(
            f"The output {output} {how} the source {source}; give another folder with --output."
        )
    for path in source.rglob("*") if source.is_dir() else ():
        if here in path.resolve().parents:
            raise RewriteError(
                f"{path} links into the output {output}; give another folder with --output."
            )
    if not place.is_dir() or not os.access(place, os.W_OK):
        what = "cannot be written" if place.is_dir() else "is a file"
        raise RewriteError(f"{output} cannot be made: {place} {what}. Give another --output.")
    if here in (Path.cwd(), *Path.cwd().parents):
        raise RewriteError(
            f"The output {output} is the folder you are in, or holds it; give another --output."
        )
    if output.exists():
        _require_replaceable(output, force=force)


def _require_replaceable(output: Path, *, force: bool) -> None:
    if not force:
        raise RewriteError(f"{output} exists; give --force to replace it, or another --output.")
    try:
        written = set(read_json(output / MANIFEST)["files"])
    except (SourceError, KeyError, TypeError) as error:
        raise RewriteError(
            f"{output} exists and was not written by normconvert; --force does not replace it. "
            "Remove it, or give another --output."
        ) from error
    if more := set(files_in(output)) - written - {MANIFEST}:
        raise RewriteError(
            f"{output / min(more)} is no part of the conversion that --force is to replace; move "
            "it away, or give another --output."
        )


def files_in(folder: Path) -> list[str]:
    """The paths of all files in `folder`, relative to it."""
    paths = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


@contextmanager
def stage(
    output: Path, *, force: bool, resume: bool = False, keep: bool = False
) -> Iterator[Staged]:
    """A folder beside `output` to build it in; removed at the end unless it was committed.

    What killed runs left behind beside `output` is removed, or put back if it is the older
    output itself. With `resume` the folder is the latest of what they left. With `resume` or `keep`
    it stays if this run is broken off in its turn, or the source cannot be read any more.

    Raises:
        RewriteError: the place cannot be written.
    """
    output = output.resolve()
    mark = f"{os.getpid()}-{secrets.token_hex(4)}"
    path = output.with_name(f".{output.name}.normconvert-{mark}")
    missing = [folder for folder in output.parents if not folder.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        left = _left_behind(output)
        begun = [each for each in left if not each.name.endswith(_OLD)]
        if resume and begun:
            max(begun, key=lambda each: each.stat().st_mtime_ns).rename(path)
        for each in left:
            shutil.rmtree(each, ignore_errors=True)
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(output, error) from error
    kept = False
    try:
        yield Staged(path, output, force)
    except SourceError:  # the Hub may answer again
        kept = resume
        raise
    except Exception:
        raise
    except BaseException:  # broken off, not failed
        kept = resume or keep
        raise
    finally:
        if not kept:
            _remove(path, missing)


def _remove(path: Path, missing: list[Path]) -> None:
    """Remove the folder `path`, and those that were made for it."""
    with _undisturbed():
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # they hold the output, or another's
            for folder in missing:
                folder.rmdir()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever the operating system refuses while `path` is written, as one sentence of ours."""
    try:
        yield
    except FileNotFoundError as error:  # all that is written is made here
        raise SourceError(f"{error.filename} cannot be read: {error.strerror}.") from error
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> NormconvertError:
    """One sentence for an operating system's error while writing under `path`."""
    found = _STAGED.fullmatch(path.name)
    output = path.with_name(found["name"]) if found else path
    return RewriteError(
        f"{output} cannot be written: {error.strerror or error}. Mend that, or give another "
        "--output."
    )


def _left_behind(output: Path) -> list[Path]:
    """What killed runs were building beside `output`. An older output that they moved is put back.

    It is removed if the new one had taken its place.
    """
    found = []
    for path in output.parent.iterdir():
        match = _STAGED.fullmatch(path.name)
        if match is None or match["name"] != output.name:
            continue
        process = int(match["process"])
        if process != os.getpid() and _alive(process):  # ours anew: as in every container
            continue
        if match["old"] and not output.exists():
            path.rename(output)
        else:
            found.append(path)
    return found


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the end of the block. They only reach the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: arrived.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(arrived[0])


def _sync(folder: Path) -> None:
    """Have every file on the disk before the folder gets its name."""
    for root, _, names in os.walk(folder):
        for name in (*names, "."):
            file = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(file)
            except OSError as error:  # some network file systems have no such thing for folders
                if error.errno not in _NOT_SUPPORTED:
                    raise
            finally:
                os.close(file)
