"""The process: from a command line to an exit status. 0: done or equivalent, 1: not, 2: refused."""

from __future__ import annotations

import gc
import os
import signal
import sys
from contextlib import suppress
from itertools import pairwise
from typing import NoReturn

import typer

from normconvert.cli.app import app
from normconvert.errors import NormconvertError


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
    """Run the command line; turn what is refused into one sentence and exit status 2."""
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except NormconvertError as error:
        _fail(error.code, str(error))
    except Interrupted:
        _fail("interrupted", "Interrupted; no output was left half-written.")
    except (OSError, MemoryError) as error:
        _fail("system", f"{str(error) or type(error).__name__}.")


def _interrupt(*_: object) -> None:
    _ignore_signals()
    raise Interrupted


def _ignore_signals() -> None:
    """We are leaving: said once is enough."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _fail(code: str, message: str) -> NoReturn:
    if "--debug" in sys.argv:
        raise
    if _json_on_stdout(sys.argv[1:]):
        from normconvert.cli.show import show_json

        with suppress(OSError):  # it may be what has failed
            show_json({"error": {"code": code, "message": message}})
    typer.echo(f"normconvert: {message}", err=True)
    raise SystemExit(2)


def _json_on_stdout(arguments: list[str]) -> bool:
    """Whether --json was given, which for verify-equivalence needs to be --json -."""
    if "verify-equivalence" not in arguments:
        return "--json" in arguments
    return "--json=-" in arguments or ("--json", "-") in pairwise(arguments)
