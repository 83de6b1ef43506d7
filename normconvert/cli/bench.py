"""The command `bench`."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from normconvert.cli.options import (
    BenchDtype,
    Debug,
    Device,
    Json,
    Model,
    NoCompile,
    PlotFile,
    Revision,
    Seconds,
    Threads,
    Trust,
)
from normconvert.ir.bench import BenchOptions


def bench(
    model: Model,
    converted: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="Its conversion. Default: one made for this.", show_default=False),
    ] = None,
    plot: PlotFile = None,
    dtype: BenchDtype = "keep",
    device: Device = None,
    threads: Threads = None,
    seconds: Seconds = 5.0,
    no_compile: NoCompile = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what a conversion buys on this machine."""
    from normconvert.benchmark import bench as measure
    from normconvert.cli.progress import progress

    if plot is not None:
        from normconvert.cli.plot import check_plot, draw

        check_plot(plot)
    options = BenchOptions(
        dtype=None if dtype == "keep" else dtype,
        device=device or "cpu",
        threads=threads,
        seconds=seconds,
        compile=not no_compile,
        trust_remote_code=trust_remote_code,
    )
    with progress(hidden=as_json) as listen:
        report = measure(model, converted, options, revision=revision, listen=listen)
    if plot is not None:
        draw(report, plot)
    if as_json:
        from normconvert.cli.show import show_json

        show_json(report.to_json())
    else:
        from normconvert.cli.show_bench import show_bench

        show_bench(report)
