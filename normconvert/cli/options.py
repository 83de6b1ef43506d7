"""The options that several commands share. Typer evaluates them at run time, on Python 3.10 too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from normconvert.errors import NormconvertError

Output = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("-o", "--output", help="Default: ./NAME-REWRITE.", show_default=False),
]
Format = Annotated[
    Literal["stock", "native"],
    typer.Option(
        help="stock: the same architecture, for any runtime. native: with other norms, and the "
        "code for them."
    ),
]
FormatOfLayerNorms = Annotated[
    Literal["stock", "native"] | None,
    typer.Option(
        help="stock: the same architecture, for any runtime. native: with other norms, and the "
        "code for them. Default: native, or stock with a target."
    ),
]
Dtype = Annotated[
    Literal["keep", "float32", "bfloat16", "float16"],
    typer.Option(help="The dtype to store all floating-point weights in."),
]
BenchDtype = Annotated[
    Literal["keep", "float32", "bfloat16", "float16"],
    typer.Option(help="The dtype to run the models in."),
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
    bool,
    typer.Option("--no-verify", help="Make no certificate at the end, and compare no logits."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier output.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with a conversion that was broken off.")
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Fetch a Hub repository shard by shard, for one that is larger than the disk.",
    ),
]
Model = Annotated[str, typer.Argument(help="A local folder or a Hub id.", show_default=False)]
Tied = Annotated[
    Literal["keep", "untie"],
    typer.Option(help="Keep tied embeddings tied, or store the head on its own to fold into it."),
]
Returns = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        help="An output of the model that must stay the same, such as pooler_output, while the "
        "others may change; give it once for each. Default: all of them stay.",
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
Push = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--push", help="Push the output to USER/NAME on the Hub.", show_default=False),
]
Unverified = Annotated[
    bool, typer.Option("--unverified", help="Publish what is not verified as equivalent, too.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
JsonFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--json",
        help="Write the report here; - for stdout.",
        dir_okay=False,
        allow_dash=True,
        show_default=False,
    ),
]
HtmlFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--report",
        help="Write the report here as one HTML page.",
        dir_okay=False,
        show_default=False,
    ),
]
TextFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        help="A text file to compare on.", exists=True, dir_okay=False, show_default=False
    ),
]
ComputeDtype = Annotated[
    Optional[Literal["float64", "float32", "bfloat16", "float16"]],  # noqa: UP045
    typer.Option(help="Compute in this dtype. Default: the next wider one than the weights'."),
]
Device = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Compute on this device, such as cuda:0. Default: cpu.", show_default=False),
]
Threads = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="CPU threads. Default: as many as torch takes.", min=1, show_default=False),
]
Seconds = Annotated[
    float, typer.Option(help="How long to measure each comparison; at least five rounds.", min=0)
]
NoCompile = Annotated[
    bool, typer.Option("--no-compile", help="Leave out torch.compile, which takes its time.")
]
PlotFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--plot",
        help="Draw the result here: .png, .svg or .pdf. Needs normconvert[plot].",
        dir_okay=False,
        show_default=False,
    ),
]
DeviceMap = Annotated[
    Optional[Literal["auto", "balanced", "balanced_low_0", "sequential"]],  # noqa: UP045
    typer.Option(help="Divide the model among devices, memory and disk.", show_default=False),
]
MaxMemory = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        help="How much a device may hold, such as cpu=8GiB or 0=20GiB; give it once for each.",
        show_default=False,
    ),
]


def _speed(given: str | int) -> int:
    """Bytes per second of a speed such as 500MB/s."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kKMGT])(i?)B(?:/s)?)?", str(given))
    speed = 0
    if match is not None:
        number, unit, binary = match.groups()
        power = "KMGT".index(unit.upper()) + 1 if unit else 0
        speed = int(float(number) * (1024 if binary else 1000) ** power)
    if speed < 1:
        raise typer.BadParameter(f"{given!r} is no speed; write one such as 500MB/s or 2GB/s")
    return speed


DiskSpeed = Annotated[
    int,
    typer.Option(
        parser=_speed,
        metavar="SPEED",
        help="What the disk reads and writes, to tell how long a conversion takes.",
        show_default="500MB/s",
    ),
]
Private = Annotated[bool, typer.Option("--private", help="For you alone, if it is new.")]
Branch = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="The branch to push to.", show_default=False),
]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")]
Message = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="The message of the commit.", show_default=False),
]
Token = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="A token of the Hub. Default: that of `hf auth login`, or HF_TOKEN."),
]


def read_text(path: Path) -> str:
    """The text that --text names."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise NormconvertError(f"{path} is not UTF-8 text; give --text another file.") from error


def discard(file: Path, *models: str) -> None:
    """Remove the report of an earlier run, which nobody should take for this one's.

    Raises:
        typer.BadParameter: it is a file of one of the `models`.
    """
    if file.is_file():
        if not {Path(model).resolve() for model in models}.isdisjoint(file.resolve().parents):
            raise typer.BadParameter(f"{file} is a file of a model; give the report another place")
        file.unlink()


def limits(given: list[str]) -> dict[int | str, int | str]:
    """Device -> how much it may hold, of arguments such as cpu=8GiB."""
    found: dict[int | str, int | str] = {}
    for each in given:
        device, equals, size = each.partition("=")
        if not equals:
            raise typer.BadParameter(f"--max-memory {each}: write DEVICE=SIZE, such as cpu=8GiB")
        found[int(device) if device.isdigit() else device] = size
    return found
