"""The Python interface, and the one file that knows the order of the stages.

source ──► trace ──► plan ──► rewrite ──► verify (──► push, of what is streamed)
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from normconvert.cost import DISK_SPEED
from normconvert.errors import NormconvertError, PlanError, VerificationError
from normconvert.ir.event import Event, Listener, ignore
from normconvert.ir.report import Algebra, Certificate, Conversion, Equivalence, Inspection
from normconvert.processes import ALONE, Processes
from normconvert.source import Checkpoint, Extent, download, local_path, open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from normconvert.ir.graph import Graph
    from normconvert.ir.plan import Dtype, Format, Plan, Tied
    from normconvert.publish import Upload
    from normconvert.settle import Request

Rewrite: TypeAlias = Literal["flashnorm", "rmsnorm", "crmsnorm", "prmsnorm"]


def inspect(
    model: str | Path,
    *,
    tied: Tied = "keep",
    returns: tuple[str, ...] = (),
    disk_speed: int = DISK_SPEED,
    revision: str | None = None,
    model_class: type[PreTrainedModel] | None = None,
    trust_remote_code: bool = False,
    listen: Listener = ignore,
) -> Inspection:
    """What the rewrites would do to `model`, a local folder or a Hub id.

    Reads headers only; of a conversion also its gains, which tell what is left to do.

    `disk_speed`, in bytes per second, is what the time is reckoned with. `returns` and
    `model_class` as in `convert`.

    Raises:
        NormconvertError: the checkpoint cannot be read or its model cannot be traced.
    """
    from normconvert.inspection import inspection_of, plan_to_show
    from normconvert.planner import REWRITES, make_plan

    checkpoint = _open(model, revision, model_class, _to_plan(trust_remote_code))
    graph = _graph(checkpoint, returns, trust_remote_code, listen)
    plan = plan_to_show(graph, checkpoint, tied)
    inspection = inspection_of(graph, checkpoint, plan, disk_speed)
    if not any(norm.kind == "layernorm" for norm in graph.norms):
        return inspection
    native = make_plan(graph, checkpoint, REWRITES["rmsnorm"], format="native", tied=tied)
    return replace(inspection, rmsnorm=native)


def convert(
    model: str | Path,
    output: str | Path | None = None,
    rewrite: Rewrite | tuple[Rewrite, ...] = "flashnorm",
    *,
    format: Format | None = None,
    tied: Tied = "keep",
    dtype: Dtype = "keep",
    fraction: float = 0.0625,
    target: str | None = None,
    returns: tuple[str, ...] = (),
    dry_run: bool = False,
    verify: bool = True,
    force: bool = False,
    resume: bool = False,
    stream: bool = False,
    stream_to: str | None = None,
    revision: str | None = None,
    model_class: type[PreTrainedModel] | None = None,
    trust_remote_code: bool = False,
    listen: Listener = ignore,
    processes: Processes = ALONE,
) -> Conversion:
    """Rewrite the checkpoint `model` into the folder `output` (default: ./NAME-REWRITE).

    `rewrite` may be several; they are computed together and rounded once, in whatever order they
    are given. `format` is "stock" for flashnorm alone and "native" for the others unless given.
    `fraction` is the share of the coordinates that a pRMSNorm looks at. `target` is the model_type
    of transformers that the output of rmsnorm gets, if it provably computes the same. `returns`
    names the outputs of the model that must stay the same, such as ("pooler_output",), where
    others stand in the way; all of them unless given. With `resume`, the shards stay that an
    earlier run, which was broken off, had completed of the same conversion. `model_class` is a
    class of your own, a subclass of `transformers.PreTrainedModel`, to run the model in.
    `processes` are those that help to write and to certify, if this is the first of several.

    With `stream`, a Hub repository is fetched and rewritten shard by shard, and never whole on the
    disk; the certificate is made, but no logits are compared. `stream_to` is the Hub repository
    that the output goes to, shard by shard as well: then nothing of it stays here.

    The result is verified before it appears under its name; see `Conversion.status` for how it
    ended. Weights are computed exactly and rounded once to their stored dtype.

    Raises:
        NormconvertError: anything refused or wrong in the input; nothing was written.
    """
    from normconvert.inspection import inspection_of
    from normconvert.rewrite import add_to_manifest, stage, write
    from normconvert.rewrite.folder import check_output
    from normconvert.settle import Request

    rewrites = (rewrite,) if isinstance(rewrite, str) else rewrite
    request = Request(
        rewrites=rewrites,
        format=format or ("stock" if target or rewrites == ("flashnorm",) else "native"),
        tied=tied,
        dtype=dtype,
        fraction=fraction,
        target=target,
        returns=returns,
    )
    place = local_path(output if output is not None else default_output(model, rewrites[-1]))
    local = local_path(model)
    stream = stream or stream_to is not None
    if stream:
        from normconvert.stream import require_possible

        sent = stream_to is not None
        require_possible(
            local, rewrites, processes.count, resume=resume, certified=verify, sent=sent
        )
    if not dry_run and stream_to is None:  # before any work: a wrong one should cost no time
        check_output(place, local, force=force)
    extent = _to_plan(trust_remote_code) if dry_run else "files"
    checkpoint = _open(model, revision, model_class, extent)
    graph = _graph(checkpoint, returns, trust_remote_code, listen)
    plan, base, unchanged = _plan(graph, checkpoint, request)
    inspection = inspection_of(graph, checkpoint, plan)
    if unchanged or dry_run:
        status: Literal["unchanged", "planned"] = "unchanged" if unchanged else "planned"
        return Conversion(status=status, output=None, inspection=inspection, verification=None)
    upload, pushed = None if stream_to is None else _upload(stream_to), None
    if not stream:
        download(checkpoint)
    manifest = _manifest(checkpoint, plan, request)
    with stage(place, force=force, resume=resume, keep=processes.count > 1) as staged:
        if stream:
            from normconvert.stream import write_stream

            verification, kept = write_stream(
                plan,
                base,
                staged.path,
                manifest,
                goal=stream_to or str(place),
                certified=verify,
                send=None if upload is None else upload.send,
                listen=listen,
            )
        else:
            kept = write(plan, base, staged.path, manifest, listen, processes)
            written = replace(_open(staged.path, None, model_class), model=str(place))
            verification = (
                _verified(
                    plan, base, checkpoint, written, returns, trust_remote_code, listen, processes
                )
                if verify
                else None
            )
        rejected = verification is not None and not _acceptable(verification, plan)
        if not rejected:
            if verification is not None:
                names = {"original": manifest["source"]["model"], "converted": place.name}
                report = {**verification.to_json(), **names}  # no folders of this machine
                add_to_manifest(staged.path, "verification", report)
            if upload is None:
                staged.commit()
            else:
                pushed = upload.commit(staged.path)
    return Conversion(
        status="rejected" if rejected else "converted",
        output=None if rejected or upload is not None else str(place),
        inspection=inspection,
        verification=verification,
        pushed=pushed,
        kept_shards=kept if resume else None,
    )


def verify_equivalence(
    original: str | Path,
    converted: str | Path,
    *,
    text: str | None = None,
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None,
    returns: tuple[str, ...] = (),
    revision: str | None = None,
    device_map: str | Mapping[str, str] | None = None,
    max_memory: Mapping[Any, int | str] | None = None,
    model_class: type[PreTrainedModel] | None = None,
    trust_remote_code: bool = False,
    listen: Listener = ignore,
    processes: Processes = ALONE,
) -> Equivalence:
    """Whether two checkpoints compute the same: by their weights, and by their logits.

    If `converted` says how it was converted, the plan is made anew from `original`: every byte
    of `converted` is held against it, and every rewritten norm is checked with what reads it,
    before rounding. Then the logits are compared, on `text` (or a shipped one) and random tokens.

    `dtype` is the dtype to compute in; by default the next wider one than the weights', in
    which the rounding of the arithmetic does not hide that of the weights. `returns` names the
    outputs to compare; by default the logits, or without a head the last hidden states.
    `revision` is the original's, if that is a Hub repository.
    `device_map` (or a device, such as "cuda:0") and `max_memory` are those of `from_pretrained`,
    for the logits; by default these are computed on the CPU, and of a model that does not fit into
    memory, the weights are read from disk while it runs. `model_class` as in `convert`, for both.
    `processes` are those that help to certify, if this is the first of several.

    Raises:
        NormconvertError: one of them cannot be read or run.
    """
    from normconvert.verify import compare, place

    placement = place(device_map, max_memory)
    pair = _open(original, revision, model_class), _open(converted, None, model_class)
    for each in pair:
        download(each)
    certificate, algebra, centered, notes = _proof(*pair, trust_remote_code, listen, processes)
    report = compare(
        *pair,
        text=text,
        dtype=dtype,
        returns=returns,
        certificate=certificate,
        algebra=algebra,
        centered=centered,
        trust_remote_code=trust_remote_code,
        listen=listen,
        placement=placement,
    )
    return replace(report, notes=(*report.notes, *notes))


def default_output(model: str | Path, rewrite: str) -> Path:
    """./NAME-REWRITE, where NAME is the last part of the folder or Hub id."""
    path = local_path(model)
    name = path.resolve().name if path.is_dir() else path.name
    return Path(f"{name}-{rewrite}")


def _open(
    model: str | Path,
    revision: str | None,
    model_class: type[PreTrainedModel] | None,
    extent: Extent = "files",
) -> Checkpoint:
    opened = open_checkpoint(str(model), revision=revision, extent=extent)
    return replace(opened, model_class=model_class)


def _to_plan(trust_remote_code: bool) -> Extent:
    """What of a Hub repository a plan is made of."""
    return "code" if trust_remote_code else "config"


def _graph(
    checkpoint: Checkpoint, returns: tuple[str, ...], trust_remote_code: bool, listen: Listener
) -> Graph:
    listen(Event("tracing", 0, 1))
    from normconvert.trace import trace

    graph = trace(checkpoint, trust_remote_code=trust_remote_code)
    listen(Event("tracing", 1, 1))
    try:
        return graph.returning(returns) if returns else graph
    except KeyError as error:
        known = ", ".join(dict.fromkeys(graph.output_fields))
        raise PlanError(
            f"{graph.model} has no output {error.args[0]!r}; its outputs are {known}."
        ) from error


def _plan(graph: Graph, checkpoint: Checkpoint, request: Request) -> tuple[Plan, Checkpoint, bool]:
    """The plan, the checkpoint to write it from, and whether there is nothing left to do."""
    from normconvert.settle import settle

    plan, unchanged = settle(graph, checkpoint, request)
    if request.target is None:
        return plan, checkpoint, unchanged
    from normconvert.retarget import retarget

    return *retarget(plan, checkpoint, request.target), unchanged


def _verified(
    plan: Plan,
    base: Checkpoint,
    original: Checkpoint,
    written: Checkpoint,
    returns: tuple[str, ...],
    trust_remote_code: bool,
    listen: Listener,
    processes: Processes,
) -> Equivalence:
    """What a conversion ends with: the certificate of what was written, and the logits."""
    from normconvert.verify import certify, compare

    return compare(
        original,
        written,
        text=None,
        dtype=None,
        returns=returns,
        certificate=certify(plan, base, written, listen, processes),
        algebra=None,
        centered="rmsnorm" in plan.rules,
        trust_remote_code=trust_remote_code,
        listen=listen,
    )


def _upload(repo_id: str) -> Upload:
    from normconvert.publish import Upload

    return Upload(repo_id)


def _proof(
    original: Checkpoint,
    converted: Checkpoint,
    trust_remote_code: bool,
    listen: Listener,
    processes: Processes,
) -> tuple[Certificate | None, Algebra | None, bool, tuple[str, ...]]:
    """What a plan made anew says of a checkpoint that tells how it was converted.

    The certificate, the algebra, whether streams were centered, and notes.
    """
    from normconvert.planner import modules_of
    from normconvert.settle import Request
    from normconvert.verify import certify, check_sites, refused, stored_model, stored_options

    try:
        options = stored_options(converted)
        if options is None:
            return None, None, False, ()
        lists = {name: tuple(each) for name, each in options.items() if isinstance(each, list)}
        request = Request(**{**options, **lists})
        graph = _graph(original, request.returns, trust_remote_code, listen)
        made_of = stored_model(converted)
        if made_of not in (None, graph.model):
            what = f"it is a {graph.model}, and {converted.model} was made of a {made_of}"
            return refused(original.model, what), None, False, ()
        plan, base, _ = _plan(graph, original, request)
    except (NormconvertError, TypeError) as error:
        what = f"no plan can be made for it with the stored options ({error})"
        return refused(original.model, what), None, False, ()
    certificate = certify(plan, base, converted, listen, processes)
    centered = "rmsnorm" in plan.rules
    if plan.changed("prmsnorm"):
        return certificate, None, centered, ()
    try:
        modules = modules_of(graph)
        algebra = check_sites(plan, original, converted, modules, trust_remote_code)
    except VerificationError as error:
        return certificate, None, centered, (str(error),)
    return certificate, algebra, centered, ()


def _acceptable(verification: Equivalence, plan: Plan) -> bool:
    """An approximation need not be equivalent, but what the plan says: its figures are told."""
    certificate = verification.certificate
    approximate = bool(plan.changed("prmsnorm")) and certificate is not None and certificate.valid
    return verification.equivalent or approximate


def _manifest(checkpoint: Checkpoint, plan: Plan, request: Request) -> dict[str, Any]:
    """The content of normconvert.json. A local source is named without its place."""
    from normconvert import __version__

    name = checkpoint.model if checkpoint.commit else checkpoint.folder.resolve().name
    source = {"model": name, "commit": checkpoint.commit}
    if (given := checkpoint.model_class) is not None:
        source["model_class"] = f"{given.__module__}.{given.__qualname__}"
    return {
        "normconvert": __version__,
        "source": source,
        "options": asdict(request),
        "plan": plan.to_json(),
    }
