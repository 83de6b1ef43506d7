"""The commands: one thin function each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Optional

import typer

from normconvert import __version__
from normconvert.errors import NormconvertError

if TYPE_CHECKING:
    from normconvert.api import Rewrite

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Typer's boxes would double the time that --help takes
    help="Rewrite the normalization layers of Hugging Face checkpoints exactly, and prove it.",
)

Output = Annotated[
    Optional[Path],  # noqa: UP045  (Typer evaluates this at run time on Python 3.10)
    typer.Option("-o", "--output", help="Default: ./NAME-REWRITE.", show_default=False),
]
Format = Annotated[
    Literal["stock", "native"],
    typer.Option(
        help="stock: the same architecture, for any runtime. native: with other norms, and the "
        "code for them."
    ),
]
Dtype = Annotated[
    Literal["keep", "float32", "bfloat16", "float16"],
    typer.Option(help="The dtype to store all floating-point weights in."),
]
Target = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="The model_type of a stock model to become, such as llama, if the two provably "
        "compute the same. Stock format.",
        show_default=False,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Plan, print, write nothing.")]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Do not compare the logits at the end.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Model = Annotated[str, typer.Argument(help="A local folder or a Hub id.", show_default=False)]
Tied = Annotated[
    Literal["keep", "untie"],
    typer.Option(help="Keep tied embeddings tied, or store the head on its own to fold into it."),
]
Returns = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        help="An output of the model that must stay the same, such as pooler_output; give it once "
        "for each. Default: all of them.",
        show_default=False,
    ),
]
Revision = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Branch, tag or commit of a Hub repository.", show_default=False),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the model code in the checkpoint.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


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
    returns: Returns = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fold every norm's gain into the weights that read it.

    This is FlashNorm, arXiv 2407.09577.
    """
    _convert(
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
        returns=returns,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )


@app.command()
def rmsnorm(
    model: Model,
    output: Output = None,
    format: Format = "native",
    target: Target = None,
    tied: Tied = "keep",
    dtype: Dtype = "keep",
    dry_run: DryRun = False,
    no_verify: NoVerify = False,
    force: Force = False,
    returns: Returns = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn LayerNorms into RMSNorms, and fold their gains.

    This is Pre-RMSNorm, arXiv 2305.14858.
    """
    _convert(
        model,
        output,
        ("rmsnorm",),
        as_json=as_json,
        format="stock" if target else format,
        target=target,
        tied=tied,
        dtype=dtype,
        dry_run=dry_run,
        verify=not no_verify,
        force=force,
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
    returns: Returns = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn LayerNorms into CRMSNorms, on d - 1 coordinates.

    This is Pre-CRMSNorm, arXiv 2305.14858.
    """
    _convert(
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
    returns: Returns = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make RMSNorms partial ones, which is an approximation.

    This is pRMSNorm, arXiv 1910.07467. The report says how far the model moves.
    """
    _convert(
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
    returns: Returns = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert as a recipe says."""
    from normconvert.recipe import read_recipe

    found = read_recipe(recipe)
    _convert(
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
        returns=returns,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )


def _convert(
    model: str,
    output: Path | None,
    rewrites: tuple[Rewrite, ...],
    *,
    returns: list[str] | None,
    as_json: bool,
    **options: Any,
) -> NoReturn:
    from normconvert.api import convert
    from normconvert.cli.progress import progress
    from normconvert.cli.show import show_conversion, show_json

    with progress(hidden=as_json) as listen:
        kept = tuple(returns or ())
        report = convert(model, output, rewrites, returns=kept, listen=listen, **options)
    show_json(report.to_json()) if as_json else show_conversion(report)
    raise typer.Exit(1 if report.status == "rejected" else 0)


@app.command()
def inspect(
    model: Model,
    tied: Tied = "keep",
    returns: Returns = None,
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
            revision=revision,
            trust_remote_code=trust_remote_code,
            listen=listen,
        )
    show_json(report.to_json()) if as_json else show_inspection(report)


@app.command("verify-equivalence")
def verify_equivalence(
    original: Model,
    converted: Annotated[str, typer.Argument(help="The other one.", show_default=False)],
    json_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", help="Write the report here; - for stdout.", show_default=False),
    ] = None,
    html: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--report", help="Write the report here as one HTML page.", show_default=False
        ),
    ] = None,
    text: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="A text file to compare on.", exists=True, dir_okay=False, show_default=False
        ),
    ] = None,
    dtype: Annotated[
        Optional[Literal["float64", "float32", "bfloat16", "float16"]],  # noqa: UP045
        typer.Option(help="Compute in this dtype. Default: the next wider one than the weights'."),
    ] = None,
    returns: Returns = None,
    trust_remote_code: Trust = False,
    debug: Debug = False,
) -> None:
    """Compare the logits of two checkpoints. Exit status 0: equivalent, 1: not."""
    from normconvert.api import verify_equivalence as verify
    from normconvert.cli.progress import progress
    from normconvert.cli.show import show_equivalence, show_json, to_text

    to_stdout = str(json_file) == "-"
    with progress(hidden=to_stdout) as listen:
        report = verify(
            original,
            converted,
            text=None if text is None else _read(text),
            dtype=dtype,
            returns=tuple(returns or ()),
            trust_remote_code=trust_remote_code,
            listen=listen,
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


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise NormconvertError(f"{path} is not UTF-8 text; give --text another file.") from error
