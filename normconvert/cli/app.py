"""The commands: one thin function each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normconvert import __version__
from normconvert.cli.bench import bench
from normconvert.cli.conversion import run_conversion
from normconvert.cli.options import (
    ComputeDtype,
    Debug,
    Device,
    DeviceMap,
    DiskSpeed,
    DryRun,
    Dtype,
    Force,
    Format,
    FormatOfLayerNorms,
    HtmlFile,
    Json,
    JsonFile,
    MaxMemory,
    Model,
    NoVerify,
    Output,
    Push,
    Resume,
    Returns,
    Revision,
    Stream,
    Target,
    TextFile,
    Tied,
    Trust,
    discard,
    limits,
    read_text,
)
from normconvert.cli.push import push
from normconvert.cost import DISK_SPEED

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Typer's boxes would double the time that --help takes
    help="Rewrite the normalization layers of Hugging Face checkpoints exactly, and prove it.",
)


@app.command()
def flashnorm(
    model: Model,
    output: Output = None,
    format: Format = "stock",
    tied: Tied = "keep",
    dtype: Dtype = "keep",
    dry_run: DryRun = False,
    no_verify: NoVerify = False,
    force: Force = False,
    resume: Resume = False,
    stream: Stream = False,
    push: Push = None,
    returns: Returns = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fold every norm's gain into the weights that read it.

    This is FlashNorm, arXiv 2407.09577.
    """
    run_conversion(
        model,
        output,
        ("flashnorm",),
        as_json=as_json,
        format=format,
        tied=tied,
        dtype=dtype,
        dry_run=dry_run,
        verify=not no_verify,
        force=force,
        resume=resume,
        stream=stream,
        push=push,
        returns=returns,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )


@app.command()
def rmsnorm(
    model: Model,
    output: Output = None,
    format: FormatOfLayerNorms = None,
    target: Target = None,
    tied: Tied = "keep",
    dtype: Dtype = "keep",
    dry_run: DryRun = False,
    no_verify: NoVerify = False,
    force: Force = False,
    resume: Resume = False,
    stream: Stream = False,
    push: Push = None,
    returns: Returns = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn LayerNorms into RMSNorms, and fold their gains.

    This is Pre-RMSNorm, arXiv 2305.14858.
    """
    run_conversion(
        model,
        output,
        ("rmsnorm",),
        as_json=as_json,
        format=format,
        target=target,
        tied=tied,
        dtype=dtype,
        dry_run=dry_run,
        verify=not no_verify,
        force=force,
        resume=resume,
        stream=stream,
        push=push,
        returns=returns,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )


@app.command()
def crmsnorm(
    model: Model,
    output: Output = None,
    tied: Tied = "keep",
    dtype: Dtype = "keep",
    dry_run: DryRun = False,
    no_verify: NoVerify = False,
    force: Force = False,
    resume: Resume = False,
    stream: Stream = False,
    push: Push = None,
    returns: Returns = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn LayerNorms into CRMSNorms, on d - 1 coordinates.

    This is Pre-CRMSNorm, arXiv 2305.14858.
    """
    run_conversion(
        model,
        output,
        ("crmsnorm",),
        as_json=as_json,
        format="native",
        tied=tied,
        dtype=dtype,
        dry_run=dry_run,
        verify=not no_verify,
        force=force,
        resume=resume,
        stream=stream,
        push=push,
        returns=returns,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )


@app.command()
def prmsnorm(
    model: Model,
    output: Output = None,
    tied: Tied = "keep",
    dtype: Dtype = "keep",
    fraction: Annotated[
        float, typer.Option(help="The share of the coordinates that the norms look at.")
    ] = 0.0625,
    dry_run: DryRun = False,
    no_verify: NoVerify = False,
    force: Force = False,
    resume: Resume = False,
    stream: Stream = False,
    push: Push = None,
    returns: Returns = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make RMSNorms partial ones, which is an approximation.

    This is pRMSNorm, arXiv 1910.07467. The report says how far the model moves.
    """
    run_conversion(
        model,
        output,
        ("prmsnorm",),
        as_json=as_json,
        format="native",
        tied=tied,
        dtype=dtype,
        fraction=fraction,
        dry_run=dry_run,
        verify=not no_verify,
        force=force,
        resume=resume,
        stream=stream,
        push=push,
        returns=returns,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; see configs/.", show_default=False)],
    model: Annotated[
        str, typer.Option("--model", help="A local folder or a Hub id.", show_default=False)
    ],
    output: Output = None,
    dry_run: DryRun = False,
    force: Force = False,
    resume: Resume = False,
    stream: Stream = False,
    push: Push = None,
    returns: Returns = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert as a recipe says."""
    from normconvert.recipe import read_recipe

    found = read_recipe(recipe)
    run_conversion(
        model,
        output,
        found.steps,
        as_json=as_json,
        format=found.format,
        tied=found.tied,
        dtype=found.dtype,
        fraction=found.fraction,
        verify=found.verify,
        dry_run=dry_run,
        force=force,
        resume=resume,
        stream=stream,
        push=push or found.push,
        returns=returns,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )


@app.command()
def inspect(
    model: Model,
    tied: Tied = "keep",
    returns: Returns = None,
    disk_speed: DiskSpeed = DISK_SPEED,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show every norm, who reads it, and whether it folds."""
    from normconvert.api import inspect as inspect_model
    from normconvert.cli.progress import progress
    from normconvert.cli.show import show_inspection, show_json

    with progress(hidden=as_json) as listen:
        report = inspect_model(
            model,
            tied=tied,
            returns=tuple(returns or ()),
            disk_speed=disk_speed,
            revision=revision,
            trust_remote_code=trust_remote_code,
            listen=listen,
        )
    show_json(report.to_json()) if as_json else show_inspection(report)


@app.command("verify-equivalence")
def verify_equivalence(
    original: Model,
    converted: Annotated[str, typer.Argument(help="The other one.", show_default=False)],
    json_file: JsonFile = None,
    html: HtmlFile = None,
    text: TextFile = None,
    dtype: ComputeDtype = None,
    device: Device = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    returns: Returns = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    debug: Debug = False,
) -> None:
    """Prove a conversion, or compare any two checkpoints. Exit status 0: equivalent, 1: not."""
    from normconvert.api import verify_equivalence as verify
    from normconvert.cli.progress import progress
    from normconvert.cli.show import show_equivalence, show_json, to_text
    from normconvert.processes import launched

    if device and device_map:
        raise typer.BadParameter("give --device or --device-map, not both")
    to_stdout = str(json_file) == "-"
    for file in (None if to_stdout else json_file, html):
        if file is not None:
            discard(file, original, converted)
    with progress(hidden=to_stdout) as listen:
        report = verify(
            original,
            converted,
            text=None if text is None else read_text(text),
            dtype=dtype,
            device_map=device or device_map,
            max_memory=limits(max_memory or []),
            returns=tuple(returns or ()),
            revision=revision,
            trust_remote_code=trust_remote_code,
            listen=listen,
            processes=launched(),
        )
    if to_stdout:
        show_json(report.to_json())
    else:
        show_equivalence(report)
    if json_file is not None and not to_stdout:
        json_file.write_text(to_text(report.to_json()) + "\n", encoding="utf-8")
    if html is not None:
        from normconvert.cli.html import page

        html.write_text(page(report), encoding="utf-8")
    raise typer.Exit(0 if report.equivalent else 1)


app.command()(bench)
app.command()(push)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
