"""Running the command: as a user does, in a process of its own, or faster in this one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

COMMAND = (sys.executable, "-m", "normconvert")
# What a developer's shell may set and a result must not depend on.
_UNSET = ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_TOKEN")


@dataclass(frozen=True, slots=True)
class Run:
    """How a command ended and what it said."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        """The one document on stdout; NaN and Infinity are none."""
        return json.loads(self.out, parse_constant=_refuse)

    def assert_refused(self, *words: str, code: str | None = None) -> None:
        """One sentence or two on stderr with all the words, status 2, no traceback."""
        assert self.status == 2, self
        assert_sentence(self.err.removeprefix("normconvert: ").rstrip("\n"), *words)
        assert self.err.startswith("normconvert: ")
        if code is None:
            assert self.out == ""
        else:
            assert self.json()["error"]["code"] == code
            assert self.json()["error"]["message"] in self.err


def assert_sentence(message: str, *words: str) -> None:
    """One line that ends as a sentence does, not too long, with all the words in it."""
    assert message.endswith((".", "?"))
    assert not message.endswith("..")
    assert "\n" not in message
    assert "Traceback" not in message
    paths = [word for word in message.split() if "/" in word]  # a temporary folder's name is long
    assert len(message) - sum(map(len, paths)) < 300, message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


def environment(**extra: str) -> dict[str, str]:
    """The environment for a process of the command: offline, unless told otherwise."""
    kept = {key: value for key, value in os.environ.items() if key not in _UNSET}
    return {**kept, "HF_HUB_OFFLINE": "1", **extra}


def run(
    *arguments: str | Path,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
    answers: str = "",
) -> Run:
    """The command in a process of its own; `before` runs in it first (limits, say).

    `answers` is what a user would type, if there were a question.
    """
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        env=environment() if env is None else dict(env),
        capture_output=True,
        text=True,
        timeout=300,
        input=answers,
        preexec_fn=before,
    )
    return Run(done.returncode, done.stdout, done.stderr)


def run_here(*arguments: str | Path, cwd: Path, columns: int | None = None) -> Run:
    """The same in this process: it does not import torch again."""
    from normconvert.cli.main import answer

    out, err = io.StringIO(), io.StringIO()
    extra = {} if columns is None else {"COLUMNS": str(columns)}
    with (
        _signals_restored(),
        _folder(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["normconvert", *map(str, arguments)]),
        mock.patch.dict(os.environ, environment(**extra), clear=True),
    ):
        try:
            answer()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        else:
            status = 0
    return Run(status, out.getvalue(), err.getvalue())


def listing(folder: Path) -> dict[str, tuple[int, int] | None]:
    """Everything under `folder`, hidden leftovers too, with the size and time of a file."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


@contextlib.contextmanager
def nothing_written(folder: Path) -> Iterator[None]:
    """Fails if anything under `folder` is other after the block than before it."""
    before = listing(folder)
    yield
    assert listing(folder) == before


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _signals_restored() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
