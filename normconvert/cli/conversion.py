"""What every converting command does: convert, show, publish, and say how it went."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from normconvert.errors import NormconvertError

if TYPE_CHECKING:
    from pathlib import Path

    from normconvert.api import Rewrite
    from normconvert.ir.report import Conversion


def run_conversion(
    model: str,
    output: Path | None,
    rewrites: tuple[Rewrite, ...],
    *,
    push: str | None,
    returns: list[str] | None,
    as_json: bool,
    **options: Any,
) -> NoReturn:
    """Convert, show the report, publish if asked to, and exit: 1 if the result was rejected."""
    from normconvert.api import convert
    from normconvert.cli.progress import progress
    from normconvert.processes import launched

    if push is not None and not options["verify"]:
        raise NormconvertError("--push needs the verification; leave out --no-verify.")
    if push is not None and "prmsnorm" in rewrites:
        raise NormconvertError(
            "prmsnorm is an approximation, which --push does not publish; convert without it, then "
            "use `normconvert push` with --unverified."
        )
    streamed_to = push if options["stream"] else None
    if streamed_to is not None and output is not None:
        raise NormconvertError(
            "With --stream and --push nothing of the output is kept here; leave out --output, or "
            "push the folder afterwards."
        )
    with progress(hidden=as_json) as listen:
        if push is not None and streamed_to is None and not options["dry_run"]:
            # Before any work, which would be for nothing. A stream asks by itself.
            from normconvert.publish import require_possible

            require_possible(push)
        report = convert(
            model,
            output,
            rewrites,
            returns=tuple(returns or ()),
            stream_to=streamed_to,
            listen=listen,
            processes=launched(),
            **options,
        )
    try:
        _show(report, push, as_json)
    except OSError as error:  # the report is lost, but not the output
        if report.status != "converted" or report.output is None:
            raise
        raise NormconvertError(
            f"{report.output} is complete, but the report cannot be printed: "
            f"{error.strerror or error}."
        ) from error
    raise typer.Exit(1 if report.status == "rejected" else 0)


def _show(report: Conversion, push: str | None, as_json: bool) -> None:
    from normconvert.cli.show import show_conversion, show_json

    if not as_json:
        show_conversion(report)
    if push is not None and report.output is not None:
        report = replace(report, pushed=_push(report.output, push))
    if as_json:
        show_json(report.to_json())
    elif report.pushed is not None:
        typer.echo(f"Pushed: {report.pushed}")


def _push(folder: str, repo_id: str) -> str:
    from normconvert.publish import PushError
    from normconvert.publish import push as publish

    try:
        return publish(folder, repo_id)
    except PushError as error:
        raise PushError(
            f"{error} The conversion is complete; to publish it: normconvert push {folder} "
            f"{repo_id}"
        ) from error
