"""The process: from a command line to an exit status. 0: done or equivalent, 1: not, 2: refused."""

from __future__ import annotations

import gc
import os
import signal
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import FrameType

import typer

from normconvert.cli.app import app
from normconvert.errors import NormconvertError
from normconvert.processes import Processes, ProcessLost, launched

# Typer exports no name for it. It is what every mistake in the command line is.
UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM: unwinds everything, so that what was begun is removed."""


def main() -> None:
    """The process: a command line, and what makes it start and end quickly."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal of ASCII
    gc.set_threshold(100_000)  # importing torch and transformers makes much and drops nothing
    try:
        answer()
    finally:
        _ignore_signals()
        gc.freeze()  # the interpreter would search all of it before it ends


def answer() -> None:
    """Run the command line; turn what is refused into one sentence and exit status 2.

    Of several processes the first does that. The others help it, and end as it does.
    """
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    processes = launched()
    try:
        status = _run() if processes.count == 1 else _run_together(processes)
    except (Interrupted, ProcessLost):
        status = _broken_off(processes)
    raise SystemExit(status)


def _run() -> int:
    """The exit status of the command line."""
    try:
        return app(standalone_mode=False) or 0
    except UsageError as error:
        return _fail_usage(error)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except NormconvertError as error:
        return _fail(error.code, str(error))
    except (OSError, MemoryError) as error:
        return _fail("system", f"{str(error) or type(error).__name__}.")


def _run_together(processes: Processes) -> int:
    """The exit status of the command line, in every process."""
    try:
        processes.join()
    except NormconvertError as error:
        return _fail(error.code, str(error)) if processes.first_to_tell() else 2
    status = processes.follow() if processes.rank else _run()
    _ignore_signals()
    processes.leave(status)
    return status


def _broken_off(processes: Processes) -> int:
    if processes.count == 1:
        return _fail("interrupted", "Interrupted; no output was left half-written.")
    if processes.first_to_tell():
        return _fail(
            "interrupted",
            f"Interrupted, or one of the {processes.count} processes has ended; no output was left "
            "half-written, and a conversion goes on with --resume.",
        )
    return 2


def _interrupt(_: int, frame: FrameType | None) -> None:
    """End what runs; a moment later, where torch would end the process without another word."""
    if _within_fake_mode(frame):
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, _A_MOMENT)
        return
    _ignore_signals()
    raise Interrupted


_A_MOMENT = 0.002  # seconds
_FAKE_MODE = os.path.join("torch", "_subclasses") + os.sep


def _within_fake_mode(frame: FrameType | None) -> bool:
    """Whether torch is about to put a mode back in C++, which must not fail."""
    while frame is not None:
        if _FAKE_MODE in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _ignore_signals() -> None:
    """We are leaving: said once is enough."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _fail(code: str, message: str) -> int:
    if "--debug" in sys.argv:
        raise
    document = _document(code, message)
    if _json_on_stdout():
        _print(document)
    elif file := _given("--json"):
        _write(document, Path(file))
    typer.echo(f"normconvert: {message}", err=True)
    return 2


def _fail_usage(error: typer.BadParameter) -> int:
    """What was asked for is not understood, so no file is touched that may be meant otherwise."""
    error.show()
    if _json_on_stdout():
        _print(_document("usage", error.format_message()))
    return error.exit_code


def _document(code: str, message: str) -> dict[str, dict[str, str]]:
    return {"error": {"code": code, "message": message}}


def _print(document: dict[str, dict[str, str]]) -> None:
    from normconvert.cli.show import show_json

    with suppress(OSError):  # it may be what has failed
        show_json(document)


def _write(document: dict[str, dict[str, str]], file: Path) -> None:
    from normconvert.cli.show import to_text

    with suppress(OSError):
        file.write_text(to_text(document) + "\n", encoding="utf-8")


def _json_on_stdout() -> bool:
    """Whether --json was given, which for verify-equivalence needs to be --json -."""
    if "verify-equivalence" not in sys.argv:
        return "--json" in sys.argv
    return _given("--json") == "-"


def _given(option: str) -> str:
    """The file that verify-equivalence was given with `option`; empty: none.

    Read from the arguments themselves, which may be what is wrong.
    """
    found = ""
    if "verify-equivalence" in sys.argv:
        for name, value in pairwise([*sys.argv, ""]):
            if name == option:
                found = value
            elif name.startswith(f"{option}="):
                found = name.removeprefix(f"{option}=")
    return found
