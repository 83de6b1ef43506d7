"""Several processes, as `accelerate launch` starts them: the first leads, the others help it.

The first runs the command as if it were alone. What can be divided it hands out with `share`; the
others wait for that and for its exit status, and say nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from heapq import heappop, heappush
from pathlib import Path
from socket import gethostname
from typing import Any, TypeAlias, TypeVar

from normconvert.errors import NormconvertError
from normconvert.ir.event import Listener, ignore

Job: TypeAlias = Callable[[int, int, Listener], Any]
"""Does the part of the process of that rank, of so many. It is pickled, and so is its result."""

Seen: TypeAlias = "dict[Path, tuple[int, int, int]]"
"""Of files: their inodes, sizes and times."""

_T = TypeVar("_T")

_JOINING = timedelta(minutes=2)  # gloo tries five times
_WORKING = timedelta(days=7)  # what another process may be busy for; that it ends is noticed anyway
_SECONDS_BETWEEN_LOOKS = 0.02


class ProcessLost(BaseException):
    """Another process has ended before its time. Not an error of the input: a run broken off."""


@dataclass(frozen=True, slots=True)
class Processes:
    """This process, one of `count` that run the same command; `rank` 0 is the first."""

    rank: int
    count: int

    def join(self) -> None:
        """Wait until all are there.

        Raises:
            NormconvertError: they cannot reach each other.
        """
        from accelerate import PartialState

        try:
            PartialState(cpu=True, timeout=_JOINING)
            _patient_group()
            _store()
        except RuntimeError as error:
            raise NormconvertError(
                f"The {self.count} processes cannot reach each other, or one has ended; between "
                "machines, GLOO_SOCKET_IFNAME must name the network interface that connects them."
            ) from error

    def share(self, job: Job, listen: Listener) -> list[Any]:
        """In the first process: run `job` in all of them. What each gives, once all are done.

        Raises:
            NormconvertError, OSError, MemoryError: what the first process that failed raised.
            ProcessLost: one has ended.
        """
        if self.count == 1:
            return [job(0, 1, listen)]
        self._broadcast(job)
        return self._do(job, listen)

    def follow(self) -> int:
        """In the others: do what the first shares until it ends; its exit status.

        Raises:
            ProcessLost: one has ended.
        """
        while not isinstance(job := self._broadcast(None), int):
            with suppress(NormconvertError, OSError, MemoryError):  # the first tells of it
                self._do(job, ignore)
        return job

    def leave(self, status: int) -> None:
        """Let all end together, with the exit status of the first. Who is missing is not missed."""
        with suppress(ProcessLost):
            if self.rank == 0:
                self._broadcast(status)
            _connected(lambda: None)

    def first_to_tell(self) -> bool:
        """Whether no other process has asked this yet: all notice that one has ended."""
        try:
            return bool(_store().add("normconvert/told", 1) == 1)
        except RuntimeError:
            return self.rank == 0

    def _do(self, job: Job, listen: Listener) -> list[Any]:
        from accelerate.utils import gather_object

        found: Any = None
        failure: Exception | None = None
        try:
            found = job(self.rank, self.count, listen)
        except (NormconvertError, OSError, MemoryError) as error:
            failure = error
        gathered = _connected(lambda: gather_object([(found, failure)]))
        for _, each in gathered:
            if each is not None:
                raise each
        return [found for found, _ in gathered]

    def _broadcast(self, value: Any) -> Any:
        """In every process what the first gives."""
        from accelerate.utils import broadcast_object_list

        return _connected(lambda: broadcast_object_list([value]))[0]


ALONE = Processes(rank=0, count=1)


def seen(paths: Iterable[Path]) -> Seen:
    """What tells the files `paths` from others of the same names, wherever these are.

    Raises:
        NormconvertError: one cannot be read.
    """
    found = {}
    for path in paths:
        try:
            with path.open("rb") as file:  # a shared file system asks its server when one is opened
                status = os.fstat(file.fileno())
        except OSError as error:
            raise NormconvertError(f"{path} cannot be read: {error.strerror or error}.") from error
        found[path] = status.st_ino, status.st_size, status.st_mtime_ns
    return found


def require_same(files: Seen) -> None:
    """Refuse, on another machine, to go on with other files than the first process has seen.

    Raises:
        NormconvertError: one is another, or is not there.
    """
    for path, expected in files.items():
        try:
            same = seen([path])[path] == expected
        except NormconvertError:
            same = False
        if not same:
            raise NormconvertError(
                f"{gethostname()} sees another {path} than the first process, or none; all "
                "machines need the source and the output's place on a file system that they share."
            )


def divide(
    things: tuple[_T, ...], count: int, size: Callable[[_T], int]
) -> tuple[tuple[_T, ...], ...]:
    """In `count` parts of about the same size: the largest first, each to the smallest part."""
    parts: list[list[_T]] = [[] for _ in range(count)]
    smallest = [(0, part) for part in range(count)]
    for thing in sorted(things, key=size, reverse=True):
        whole, part = heappop(smallest)
        parts[part].append(thing)
        heappush(smallest, (whole + size(thing), part))
    return tuple(tuple(part) for part in parts)


def launched() -> Processes:
    """The processes of this run, by the environment that `accelerate launch` gives each of them."""
    try:
        count, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    except (KeyError, ValueError):
        return ALONE
    return Processes(rank=rank, count=count) if count > 1 else ALONE


@cache
def _store() -> Any:
    """What the launcher keeps for the processes; it outlives them."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(*place, timeout=timedelta(seconds=5))


@cache
def _patient_group() -> Any:
    """The processes as a group in which they wait for each other's work."""
    import torch.distributed

    return torch.distributed.new_group(timeout=_WORKING, backend="gloo")


def _connected(exchange: Callable[[], Any]) -> Any:
    """What `exchange` gives, once all processes have come to it; until then signals are heard."""
    import torch.distributed

    try:
        arrived = torch.distributed.barrier(_patient_group(), async_op=True)
        while not arrived.is_completed():
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        arrived.wait()
        return exchange()
    except RuntimeError as error:  # what gloo makes of a connection that was closed
        raise ProcessLost from error
