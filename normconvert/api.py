"""The Python interface, and the one file that knows the order of the stages.

source ──► trace ──► plan ──► rewrite ──► verify
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from normconvert.errors import PlanError
from normconvert.ir.event import Event, Listener, ignore
from normconvert.ir.report import Conversion, Equivalence, Inspection
from normconvert.source import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from normconvert.ir.graph import Graph
    from normconvert.ir.plan import Dtype, Plan, Tied

Rewrite = Literal["flashnorm"]


def inspect(
    model: str | Path,
    *,
    tied: Tied = "keep",
    revision: str | None = None,
    trust_remote_code: bool = False,
    listen: Listener = ignore,
) -> Inspection:
    """What `flashnorm` would do to `model`, a local folder or a Hub id. Reads headers only.

    Raises:
        NormconvertError: the checkpoint cannot be read or its model cannot be traced.
    """
    from normconvert.planner import make_plan

    checkpoint, graph = _open(model, revision, trust_remote_code, listen)
    return _inspection(graph, checkpoint, make_plan(graph, checkpoint, ("flashnorm",), tied=tied))


def convert(
    model: str | Path,
    output: str | Path | None = None,
    rewrite: Rewrite = "flashnorm",
    *,
    format: Literal["stock"] = "stock",
    tied: Tied = "keep",
    dtype: Dtype = "keep",
    dry_run: bool = False,
    verify: bool = True,
    force: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    listen: Listener = ignore,
) -> Conversion:
    """Rewrite the checkpoint `model` into the folder `output` (default: ./NAME-REWRITE).

    The result is verified before it appears under its name; see `Conversion.status` for how it
    ended. Weights are computed exactly and rounded once to their stored dtype.

    Raises:
        NormconvertError: anything refused or wrong in the input; nothing was written.
    """
    from normconvert.rewrite import stage, write
    from normconvert.rewrite.folder import check_output

    target = Path(output) if output is not None else default_output(model, rewrite)
    local = Path(model).expanduser()
    if not dry_run:  # before any work: a wrong output should cost no time
        check_output(target, local, force=force)
    checkpoint, graph = _open(model, revision, trust_remote_code, listen)
    plan, unchanged = _settle(graph, checkpoint, rewrite, tied, dtype)
    inspection = _inspection(graph, checkpoint, plan)
    if unchanged or dry_run:
        status: Literal["unchanged", "planned"] = "unchanged" if unchanged else "planned"
        return Conversion(status=status, output=None, inspection=inspection, verification=None)
    if verify:
        from normconvert.verify import choose_dtype

        choose_dtype(checkpoint, None)  # to refuse before the work, not after it
    options = {"format": format, "tied": tied, "dtype": dtype}
    with stage(target) as staged:
        write(plan, checkpoint, staged.path, _manifest(checkpoint, plan, options), listen)
        verification = None
        if verify:
            written = replace(open_checkpoint(str(staged.path)), model=str(target))
            verification = _verify(checkpoint, written, None, None, trust_remote_code, listen)
        rejected = verification is not None and not verification.equivalent
        if not rejected:
            staged.commit()
    return Conversion(
        status="rejected" if rejected else "converted",
        output=None if rejected else str(target),
        inspection=inspection,
        verification=verification,
    )


def verify_equivalence(
    original: str | Path,
    converted: str | Path,
    *,
    text: str | None = None,
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None,
    trust_remote_code: bool = False,
    listen: Listener = ignore,
) -> Equivalence:
    """Compare the logits of two checkpoints on `text` (or a shipped one) and random tokens.

    `dtype` is the dtype to compute in; by default the next wider one than the weights', in
    which the rounding of the arithmetic does not hide that of the weights.

    Raises:
        NormconvertError: one of them cannot be read or run.
    """
    pair = open_checkpoint(str(original)), open_checkpoint(str(converted))
    return _verify(*pair, text, dtype, trust_remote_code, listen)


def default_output(model: str | Path, rewrite: str) -> Path:
    """./NAME-REWRITE, where NAME is the last part of the folder or Hub id."""
    name = Path(model).expanduser().resolve().name if Path(model).is_dir() else Path(model).name
    return Path(f"{name}-{rewrite}")


def _open(
    model: str | Path, revision: str | None, trust_remote_code: bool, listen: Listener
) -> tuple[Checkpoint, Graph]:
    checkpoint = open_checkpoint(str(model), revision=revision)
    listen(Event("tracing", 0, 1))
    from normconvert.trace import trace

    graph = trace(checkpoint, trust_remote_code=trust_remote_code)
    listen(Event("tracing", 1, 1))
    return checkpoint, graph


def _settle(
    graph: Graph, checkpoint: Checkpoint, rewrite: str, tied: Tied, dtype: Dtype
) -> tuple[Plan, bool]:
    """The plan after a look at the gains' values, and whether there is nothing left to do.

    Raises:
        PlanError: no norm can be folded.
    """
    from normconvert.planner import make_plan
    from normconvert.rewrite import IDENTITY, examine

    first = make_plan(graph, checkpoint, (rewrite,), tied=tied, dtype=dtype)
    keep = examine(first, checkpoint)
    plan = make_plan(graph, checkpoint, (rewrite,), tied=tied, dtype=dtype, keep=keep)
    already = IDENTITY in keep.values()
    if plan.folded or (already and plan.edits):
        return plan, False
    if already:
        return plan, True
    raise PlanError(f"No norm of {checkpoint.model} can be folded: {_why_not(plan)}")


def _why_not(plan: Plan) -> str:
    if not plan.verdicts:
        return f"{plan.model} has none that is known."
    example = plan.verdicts[0]
    return f"{example.norm} is kept because {example.reason} (of {len(plan.verdicts)} norms)."


def _verify(
    original: Checkpoint,
    converted: Checkpoint,
    text: str | None,
    dtype: str | None,
    trust_remote_code: bool,
    listen: Listener,
) -> Equivalence:
    from normconvert.verify import compare

    return compare(
        original,
        converted,
        text=text,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        listen=listen,
    )


def _inspection(graph: Graph, checkpoint: Checkpoint, plan: Plan) -> Inspection:
    from normconvert.planner import make_plan

    tensors = checkpoint.tensors
    untied = make_plan(graph, checkpoint, plan.rules, tied="untie") if graph.ties else plan
    return Inspection(
        model=checkpoint.model,
        commit=checkpoint.commit,
        plan=plan,
        total_tensors=len(tensors),
        total_bytes=checkpoint.nbytes,
        changed_tensors=len(plan.edits),
        changed_bytes=sum(edit.nbytes for edit in plan.edits),
        gain_bytes=sum(tensors[gain].nbytes for gain in {v.gain for v in plan.folded} if gain),
        added_bytes=_growth(checkpoint, plan),
        untied_bytes=_growth(checkpoint, untied),
    )


def _growth(checkpoint: Checkpoint, plan: Plan) -> int:
    before = (checkpoint.tensors[e.tensor] for e in plan.edits if e.tensor in checkpoint.tensors)
    return sum(edit.nbytes for edit in plan.edits) - sum(tensor.nbytes for tensor in before)


def _manifest(checkpoint: Checkpoint, plan: Plan, options: dict[str, Any]) -> dict[str, Any]:
    """The content of normconvert.json. A local source is named without its place."""
    from normconvert import __version__

    name = checkpoint.model if checkpoint.commit else checkpoint.folder.resolve().name
    return {
        "normconvert": __version__,
        "source": {"model": name, "commit": checkpoint.commit},
        "options": options,
        "plan": plan.to_json(),
    }
