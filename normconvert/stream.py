"""Stream: a plan carried out shard by shard, of a Hub repository that is never whole on the disk.

    fetch a shard, and what else its output reads ──► rewrite ──► certify ──► (send) ──► remove it

The plan is made of the headers before. What remains is the output, or nothing if it is sent on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from normconvert.errors import RewriteError
from normconvert.ir.event import Event, Listener, ignore
from normconvert.ir.report import Certificate, Equivalence
from normconvert.rewrite import (
    Layout,
    empty,
    is_complete,
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

_Certificates: TypeAlias = "dict[str, Certificate | None]"

_RECORD = ".normconvert-streamed.json"
"""Of which conversion a folder holds the first shards, and their certificates, all valid."""

_NOT_COMPARED = (
    "The logits were not compared, because the original was never whole on this machine; where it "
    "is, verify-equivalence does that."
)


def require_possible(
    model: Path,
    rewrites: tuple[str, ...],
    processes: int,
    *,
    resume: bool,
    certified: bool,
    sent: bool,
) -> None:
    """Refuse what cannot be streamed, before any work.

    Raises:
        RewriteError: it is a local folder, or what else was asked for needs it whole.
    """
    if model.is_dir():
        raise RewriteError(f"{model} is on the disk already; leave out --stream.")
    if processes > 1:
        raise RewriteError("One process fetches what is streamed; start it without a launcher.")
    if sent and resume:
        raise RewriteError(
            "With --stream and --push nothing of the output is kept here, so --resume has nothing "
            "to go on from; leave one of them out."
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
) -> tuple[Equivalence | None, int]:
    """Write the checkpoint that `plan` describes into `folder`, as `write` does.

    The folder is empty, or holds what was streamed of the same conversion before it was broken off:
    its shards stay, with their certificates. Of the source there are never more bytes on the disk
    than `source_bytes` says. A shard of the output is removed if `send` has said that it may be.
    If it is to be `certified`, the first shard that is not what the plan makes of the source is the
    last one, and is not sent. `goal` is where the output will be, for the verdict.
    Returns the verdict, if it was to be certified, and how many shards stayed.

    Raises:
        SourceError: the Hub does not give what is needed.
        RewriteError: the disk is full or not writable, or a value does not fit its dtype.
    """
    layouts = lay_out(plan, checkpoint)
    total, done = sum(layout.size for layout in layouts), 0
    written: list[Shard] = []
    with writing(folder):
        certificates = _before(folder, layouts, manifest, certified=certified)
        kept = len(certificates)
        empty(folder, keeping={_RECORD, *certificates})
        missing = [each.size for each in layouts if each.shard.name not in certificates]
        needed = max(missing, default=0) if send else sum(missing)
        require_space(folder, source_bytes(layouts) + needed)
        write_files(plan, checkpoint, layouts, folder, manifest)
        for layout in layouts:
            name = layout.shard.name
            if name not in certificates:
                with at_hand(checkpoint, reads(layout), layout.shard, folder) as near:
                    _write(layout, near, folder)
                    certificates[name] = (
                        _certificate(plan, checkpoint, near, folder / name) if certified else None
                    )
            written.append(_shard(folder / name))
            if not _passes(certificates[name]):
                return _verdict(plan, checkpoint, goal, certificates), kept
            if send is None:
                _note(folder, name, manifest, certificates)
            elif send(folder / name):
                (folder / name).unlink()
            done += layout.size
            listen(Event("streaming", done, total))
        (folder / _RECORD).unlink(missing_ok=True)
    if not certified:
        return None, kept
    config = read_json(folder / "config.json")
    whole = replace(checkpoint, folder=folder, config=config, shards=tuple(written))
    certificates[""] = certify_form(plan, checkpoint, whole)
    return _verdict(plan, checkpoint, goal, certificates), kept


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
    plan: Plan, checkpoint: Checkpoint, goal: str, certificates: _Certificates
) -> Equivalence:
    """What is known of a conversion that was streamed: the certificate, and no logits."""
    certificate = together(*(each for each in certificates.values() if each is not None))
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


def _write(layout: Layout, near: Checkpoint, folder: Path) -> None:
    own = next(shard for shard in near.shards if shard.name == layout.shard.name)
    write_shards((replace(layout, shard=own),), near, folder, ignore)


def _shard(path: Path) -> Shard:
    return Shard(name=path.name, path=path, header=read_header(path))


def _certificate(plan: Plan, checkpoint: Checkpoint, near: Checkpoint, path: Path) -> Certificate:
    one = replace(checkpoint, folder=path.parent, shards=(_shard(path),))
    return certify_tensors(plan, near, one, ignore)


def _passes(certificate: Certificate | None) -> bool:
    return certificate is None or certificate.valid


def _note(folder: Path, name: str, manifest: dict[str, Any], certificates: _Certificates) -> None:
    """Note that the shard `name` is complete, once it is on the disk."""
    with (folder / name).open("rb") as file:
        os.fsync(file.fileno())
    shards = {name: each and asdict(each) for name, each in certificates.items()}
    draft = folder / f"{_RECORD}.partial"
    draft.write_text(json.dumps({"manifest": manifest, "shards": shards}))
    draft.rename(folder / _RECORD)


def _before(
    folder: Path, layouts: tuple[Layout, ...], manifest: dict[str, Any], *, certified: bool
) -> _Certificates:
    """The shards of this conversion that are in `folder` already, with their certificates."""
    if not (folder / _RECORD).is_file():
        return {}
    record = read_json(folder / _RECORD)
    if record["manifest"] != json.loads(json.dumps(manifest)):
        return {}
    known = {
        name: None if each is None else Certificate(**{**each, "problems": ()})
        for name, each in record["shards"].items()
        if each or not certified
    }
    names = (layout.shard.name for layout in layouts if is_complete(layout, folder))
    return {name: known[name] for name in names if name in known}
