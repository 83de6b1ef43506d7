"""Stream: a plan carried out shard by shard, of a Hub repository that is never whole on the disk.

    fetch a shard, and what else its output reads ──► rewrite ──► certify ──► (send) ──► remove it

The plan is made of the headers before. What remains is the output, or nothing if it is sent on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normconvert.errors import RewriteError
from normconvert.ir.event import Event, Listener, ignore
from normconvert.ir.report import Certificate, Equivalence
from normconvert.rewrite import (
    Layout,
    lay_out,
    reads,
    require_space,
    write_files,
    write_shards,
    writing,
)
from normconvert.source import Checkpoint, Shard, at_hand, read_header
from normconvert.source.checkpoint import read_json
from normconvert.verify import certify_form, certify_tensors, together

if TYPE_CHECKING:
    from normconvert.ir.plan import Plan

_NOT_COMPARED = (
    "The logits were not compared, because the original was never whole on this machine; where it "
    "is, verify-equivalence does that."
)


def require_possible(
    model: Path, rewrites: tuple[str, ...], *, resume: bool, certified: bool, sent: bool
) -> None:
    """Refuse what cannot be streamed, before any work.

    Raises:
        RewriteError: it is a local folder, or what else was asked for needs it whole.
    """
    if model.is_dir():
        raise RewriteError(f"{model} is on the disk already; leave out --stream.")
    if resume:
        raise RewriteError(
            "What --stream has read of the source is gone, so --resume has nothing to go on from; "
            "leave one of them out."
        )
    if sent and not certified:
        raise RewriteError("--push needs the verification; leave out --no-verify.")
    if sent and "prmsnorm" in rewrites:
        raise RewriteError(
            "A pRMSNorm is an approximation, and with --stream nobody measures how good it is; "
            "leave out --stream or --push."
        )


def write_stream(
    plan: Plan,
    checkpoint: Checkpoint,
    folder: Path,
    manifest: dict[str, Any],
    *,
    goal: str,
    certified: bool,
    send: Callable[[Path], bool] | None,
    listen: Listener,
) -> Equivalence | None:
    """Write the checkpoint that `plan` describes into the empty `folder`, as `write` does.

    Of the source there are never more bytes on the disk than `source_bytes` says. A shard of the
    output is removed if `send` has said that it may be. If it is to be `certified`, the first
    shard that is not what the plan makes of the source is the last one, and is not sent. `goal` is
    where the output will be, for the verdict.

    Raises:
        SourceError: the Hub does not give what is needed.
        RewriteError: the disk is full or not writable, or a value does not fit its dtype.
    """
    layouts = lay_out(plan, checkpoint)
    sizes = [layout.size for layout in layouts]
    written: list[Shard] = []
    certificates: list[Certificate] = []
    with writing(folder):
        require_space(folder, source_bytes(layouts) + (max(sizes) if send else sum(sizes)))
        write_files(plan, checkpoint, layouts, folder, manifest)
        for layout in layouts:
            listen(Event("streaming", sum(sizes[: len(written)]), sum(sizes)))
            with at_hand(checkpoint, reads(layout), layout.shard, folder) as near:
                shard = _write(layout, near, folder)
                written.append(shard)
                if certified:
                    one = replace(checkpoint, folder=folder, shards=(shard,))
                    certificates.append(certify_tensors(plan, near, one, ignore))
                    if not certificates[-1].valid:
                        return _verdict(plan, checkpoint, goal, together(*certificates))
            if send is not None and send(shard.path):
                shard.path.unlink()
        listen(Event("streaming", sum(sizes), sum(sizes)))
    if not certified:
        return None
    config = read_json(folder / "config.json")
    whole = replace(checkpoint, folder=folder, config=config, shards=tuple(written))
    form = certify_form(plan, checkpoint, whole)
    return _verdict(plan, checkpoint, goal, together(form, *certificates))


def source_bytes(layouts: tuple[Layout, ...]) -> int:
    """The most bytes of the source that are on the disk at a time, the Hub's cache not counted.

    That is one shard, and what its output reads of the others: gains, or the embeddings that an
    untied head is made of.
    """
    nbytes = {t.name: t.nbytes for each in layouts for t in each.shard.header.tensors}
    most = 0
    for layout in layouts:
        header = layout.shard.header
        own = {tensor.name for tensor in header.tensors}
        shard = header.data_start + sum(nbytes[name] for name in own)
        most = max(most, shard + sum(nbytes[name] for name in reads(layout) - own))
    return most


def _verdict(
    plan: Plan, checkpoint: Checkpoint, goal: str, certificate: Certificate
) -> Equivalence:
    """What is known of a conversion that was streamed: the certificate, and no logits."""
    return Equivalence(
        original=checkpoint.model,
        converted=goal,
        equivalent=certificate.valid and not plan.changed("prmsnorm"),
        dtype=None,
        differing_tensors=certificate.rewritten,
        comparisons=(),
        certificate=certificate,
        algebra=None,
        generation=None,
        layers=(),
        parts_at=None,
        notes=(_NOT_COMPARED,),
    )


def _write(layout: Layout, near: Checkpoint, folder: Path) -> Shard:
    own = next(shard for shard in near.shards if shard.name == layout.shard.name)
    write_shards((replace(layout, shard=own),), near, folder, ignore)
    path = folder / own.name
    return Shard(name=own.name, path=path, header=read_header(path))
