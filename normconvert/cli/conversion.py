"""What every converting command does: convert, show, publish, and say how it went."""

from __future__ import annotations

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
    with progress(hidden=as_json) as listen:
        kept = tuple(returns or ())
        report = convert(
            model,
            output,
            rewrites,
            returns=kept,
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
    url = _push(report.output, push) if push is not None and report.output is not None else None
    if as_json:
        show_json(report.to_json() | ({"pushed": url} if url else {}))
    elif url:
        typer.echo(f"Pushed: {url}")


def _push(folder: str, repo_id: str) -> str:
    from normconvert.push import push as publish

    return publish(folder, repo_id)
