"""The certificate: both checkpoints read once, every byte of the output accounted for.

Rewritten tensors are computed anew from the original, by an evaluator that is not the converter's,
and each stored number is checked to be the exact one correctly rounded. Everything else is
compared byte for byte. That the plan is legal is another matter: it is for the caller to make it
from a fresh trace of the original.
"""

from __future__ import annotations

import filecmp
import json
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from normconvert.errors import SourceError
from normconvert.ir.event import Event, Listener
from normconvert.ir.expression import Scale, Tensor
from normconvert.ir.native import MODELING_FILE
from normconvert.ir.plan import Plan
from normconvert.ir.report import Certificate, Problem
from normconvert.processes import ALONE, Processes, Seen, divide, require_same, seen
from normconvert.source.checkpoint import INDEX_FILE, read_json
from normconvert.source.files import walk
from normconvert.verify.recompute import Recomputer, boxes
from normconvert.verify.rounded import products_are_rounded, wrongly_rounded
from normconvert.verify.stored import Stored

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from normconvert.ir.plan import Edit
    from normconvert.source import Checkpoint, Shard
    from normconvert.verify.stored import Box, Raw

MANIFEST = "normconvert.json"
_DOCUMENTATION = frozenset({"README.md", ".gitattributes"})
"""May differ: they change when a checkpoint is published, and no runtime reads them."""

_SHOWN = 20
_PIECE_BYTES = 1 << 20
_KEPT_BYTES = 16 << 20  # once that is freed, glibc's malloc keeps smaller blocks mapped
_LOW_BITS = np.uint32(0xFF)  # zero in a factor of at most 16 bits: times 8 bits, exact in float32


@dataclass(slots=True)
class _Findings:
    problems: list[Problem] = field(default_factory=list)
    undecided: int = 0

    def add(self, place: str, what: str) -> None:
        self.problems.append(Problem(place=place, what=what))

    def certificate(self, *, rewritten: int = 0, copied: int = 0, files: int = 0) -> Certificate:
        problems = sorted(self.problems, key=lambda problem: problem.place)
        return Certificate(
            rewritten=rewritten,
            copied=copied,
            files=files,
            undecided=self.undecided,
            problem_count=len(problems),
            problems=tuple(problems[:_SHOWN]),
        )


def certify(
    plan: Plan,
    original: Checkpoint,
    converted: Checkpoint,
    listen: Listener,
    processes: Processes = ALONE,
) -> Certificate:
    """Whether `converted` is what `plan` makes of `original`, and nothing else.

    `plan` is one that was made anew; the one stored with `converted` has to be the same. The
    shards are divided among the `processes`, of which this is the first.
    """
    files = seen(shard.path for each in (original, converted) for shard in each.shards)
    job = partial(_certify_part, plan, original, converted, files)
    return together(certify_form(plan, original, converted), *processes.share(job, listen))


def _certify_part(
    plan: Plan,
    original: Checkpoint,
    converted: Checkpoint,
    files: Seen,
    rank: int,
    count: int,
    listen: Listener,
) -> Certificate:
    require_same(files)
    shards = divide(converted.shards, count, _nbytes)[rank]
    return certify_tensors(plan, original, replace(converted, shards=shards), listen)


def _nbytes(shard: Shard) -> int:
    return sum(tensor.nbytes for tensor in shard.header.tensors)


def certify_form(plan: Plan, original: Checkpoint, converted: Checkpoint) -> Certificate:
    """The certificate of everything but the tensors' values, for which headers are enough."""
    findings = _Findings()
    _check_stored_plan(plan, converted, findings)
    _check_config(plan, original, converted, findings)
    compared = _check_files(plan, original, converted, findings)
    _check_names(plan, original, converted, findings)
    return findings.certificate(files=compared)


def certify_tensors(
    plan: Plan, original: Checkpoint, converted: Checkpoint, listen: Listener
) -> Certificate:
    """The certificate of the values of all tensors in `converted`, which may be a part of it.

    `original` needs to have what the plan makes them of.
    """
    findings = _Findings()
    edits = {edit.tensor: edit for edit in plan.edits}
    rewritten = [
        edits[name]
        for name in converted.tensors
        if name in edits and _fits(edits[name], converted, findings)
    ]
    known = original.tensors.keys() - edits.keys() - set(plan.omitted)
    copied = [name for name in converted.tensors if name in known]
    _check_tensors(original, converted, copied, rewritten, findings, listen)
    return findings.certificate(rewritten=len(rewritten), copied=len(copied))


def together(*parts: Certificate) -> Certificate:
    """One certificate of what several have looked at."""
    problems = [problem for part in parts for problem in part.problems]
    return Certificate(
        rewritten=sum(part.rewritten for part in parts),
        copied=sum(part.copied for part in parts),
        files=sum(part.files for part in parts),
        undecided=sum(part.undecided for part in parts),
        problem_count=sum(part.problem_count for part in parts),
        problems=tuple(sorted(problems, key=lambda problem: problem.place)[:_SHOWN]),
    )


def stored_options(converted: Checkpoint) -> dict[str, Any] | None:
    """The options of the conversion, as its manifest has them; None if there is no manifest.

    Raises:
        SourceError: there is one, but it has no options.
    """
    if not (converted.folder / MANIFEST).is_file():
        return None
    options = read_json(converted.folder / MANIFEST).get("options")
    if not isinstance(options, dict):
        raise SourceError(f"{MANIFEST} has none")
    return options


def stored_model(converted: Checkpoint) -> str | None:
    """The class of which the stored plan says that the original is; None if it does not say."""
    plan = read_json(converted.folder / MANIFEST).get("plan")
    model = plan.get("model") if isinstance(plan, dict) else None
    return model if isinstance(model, str) else None


def refused(place: str, what: str) -> Certificate:
    """A certificate of which not even the plan could be made."""
    problem = Problem(place=place, what=what)
    return Certificate(
        rewritten=0, copied=0, files=0, undecided=0, problem_count=1, problems=(problem,)
    )


def _check_stored_plan(plan: Plan, converted: Checkpoint, findings: _Findings) -> None:
    try:
        stored = Plan.from_json(read_json(converted.folder / MANIFEST)["plan"])
    except (SourceError, KeyError, ValueError, TypeError) as error:
        findings.add(MANIFEST, f"it holds no plan ({error})")
        return
    if stored == plan:
        return
    ours, theirs = ({edit.tensor: edit for edit in each.edits} for each in (plan, stored))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            findings.add(
                name, "the stored plan is another than a fresh trace of the original gives"
            )
            return
    findings.add(MANIFEST, "the stored plan is another than a fresh trace of the original gives")


def _check_config(
    plan: Plan, original: Checkpoint, converted: Checkpoint, findings: _Findings
) -> None:
    expected = json.loads(json.dumps(plan.changed_config(original.config)))
    found = converted.config
    for key in sorted(expected.keys() | found.keys()):
        if key not in found or key not in expected or expected[key] != found[key]:
            findings.add("config.json", f"{key!r} is not what the plan says")


def _check_files(
    plan: Plan, original: Checkpoint, converted: Checkpoint, findings: _Findings
) -> int:
    """Compare all files but the weights and what else the plan changes; how many there were."""
    before, after = _other_files(original), _other_files(converted)
    for name in (MANIFEST, "config.json"):
        after.pop(name, None)
        before.pop(name, None)
    if plan.native is not None:
        ours = files("normconvert.nn") / MODELING_FILE
        carried = after.pop(MODELING_FILE, None)
        if carried is None or carried.read_bytes() != ours.read_bytes():
            findings.add(MODELING_FILE, "it is not the one of this version of normconvert")
        before.pop(MODELING_FILE, None)
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            findings.add(name, "the file is missing")
        elif name not in before:
            findings.add(name, "the file is not the original's")
        elif not filecmp.cmp(before[name], after[name], shallow=False):
            findings.add(name, "the file differs from the original's")
    return len(before)


def _other_files(checkpoint: Checkpoint) -> dict[str, Path]:
    weights = {shard.name for shard in checkpoint.shards}
    if checkpoint.has_index:
        weights.add(INDEX_FILE)  # opening the checkpoint has held it against the headers
    found = {}
    for root, names in walk(checkpoint.folder):
        for name in names:
            relative = (root / name).relative_to(checkpoint.folder).as_posix()
            if relative not in weights and relative not in _DOCUMENTATION:
                found[relative] = root / name
    return {name: path for name, path in found.items() if path.is_file()}


def _check_names(
    plan: Plan, original: Checkpoint, converted: Checkpoint, findings: _Findings
) -> None:
    """Note the tensors that are missing, extra or misplaced."""
    edited, omitted = {edit.tensor for edit in plan.edits}, set(plan.omitted)
    expected = (original.tensors.keys() | edited) - omitted
    for name in sorted(expected - converted.tensors.keys()):
        findings.add(name, "the tensor is missing")
    for name in sorted(converted.tensors.keys() - expected):
        findings.add(name, "the plan has no such tensor")
    for name in original.tensors.keys() & converted.tensors.keys():
        if original.paths[name].name != converted.paths[name].name:
            findings.add(name, f"it lies in {converted.paths[name].name}, not in its shard")


def _fits(edit: Edit, converted: Checkpoint, findings: _Findings) -> bool:
    stored = converted.tensors[edit.tensor]
    if (stored.dtype, stored.shape) == (edit.dtype, edit.shape):
        return True
    findings.add(
        edit.tensor,
        f"it is stored as {stored.dtype} {list(stored.shape)}, not as {edit.dtype} "
        f"{list(edit.shape)}",
    )
    return False


def _check_tensors(
    original: Checkpoint,
    converted: Checkpoint,
    copied: list[str],
    edits: list[Edit],
    findings: _Findings,
    listen: Listener,
) -> None:
    np.empty(_KEPT_BYTES, np.uint8)
    with Stored(original) as before, Stored(converted) as after:
        check = _Check(before, after)
        jobs: list[tuple[str, int, Callable[[], tuple[int, int]]]] = [
            *((name, after.tensors[name].nbytes, partial(check.copy, name)) for name in copied),
            *((edit.tensor, edit.nbytes, partial(check.edit, edit)) for edit in edits),
        ]
        jobs.sort(key=lambda job: -job[1])  # lest one thread is left with the largest at the end
        total, done = sum(nbytes for _, nbytes, _ in jobs), 0
        listen(Event("certifying", 0, total))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            futures = {pool.submit(job): (name, nbytes) for name, nbytes, job in jobs}
            for future in as_completed(futures):
                name, nbytes = futures[future]
                wrong, undecided = future.result()
                findings.undecided += undecided
                if wrong:
                    findings.add(name, _wrong_elements(wrong, name in copied))
                done += nbytes
                listen(Event("certifying", done, total))


def _wrong_elements(count: int, copy: bool) -> str:
    what = "1 byte differs" if count == 1 else f"{count} bytes differ"
    if copy:
        return f"{what} from the original's"
    what = "1 element is" if count == 1 else f"{count} elements are"
    return f"{what} not what the plan makes of the original"


class _Check:
    """Compares one tensor at a time: how many elements of it are wrong, and how many undecided."""

    def __init__(self, before: Stored, after: Stored) -> None:
        self._before, self._after = before, after
        self._recompute = Recomputer(before)

    def copy(self, name: str) -> tuple[int, int]:
        """The bytes in which a tensor is not the original's."""
        size, wrong = self._after.tensors[name].nbytes, 0
        if self._before.tensors[name].nbytes != size:
            return size, 0
        for start in range(0, size, _PIECE_BYTES):
            piece = name, start, min(start + _PIECE_BYTES, size)
            before, after = self._before.bytes(*piece), self._after.bytes(*piece)
            if before != after:
                wrong += int(
                    (np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8)).sum()
                )
        return wrong, 0

    def edit(self, edit: Edit) -> tuple[int, int]:
        """The elements that are not what the edit's expression makes of the original."""
        wrong = undecided = 0
        product = self._short_product(edit)
        for box in boxes(edit.shape):
            raw = self._after.box(edit.tensor, box)
            if product is not None and self._is_product(raw, *product, box):
                continue
            exact = self._recompute.box(edit.expression, edit.shape, box)
            not_right, unclear = wrongly_rounded(raw, edit.dtype, exact)
            wrong += int(not_right.sum())
            undecided += unclear
        return wrong, undecided

    def _short_product(self, edit: Edit) -> tuple[str, int, npt.NDArray[np.float32]] | None:
        """The tensor, axis and factor of a product of bfloat16 that is exact in float32."""
        match edit.expression:
            case Scale(Tensor(name), axis, by) if (
                edit.dtype == self._before.tensors[name].dtype == "BF16"
            ):
                factor = self._recompute.vector(by, edit.shape[axis])
                single = factor.value.astype(np.float32)
                exact = isinstance(factor.slack, float) and (single == factor.value).all()
                short = not (single.view(np.uint32) & _LOW_BITS).any()
                # A bfloat16 is a multiple of 2**-133, and float32 ends at 2**-149.
                coarse = (factor.value * 2.0**16 % 1 == 0).all()
                return (name, axis, single) if exact and short and coarse else None
        return None

    def _is_product(
        self, raw: Raw, name: str, axis: int, factor: npt.NDArray[np.float32], box: Box
    ) -> bool:
        along = [-1 if i == axis else 1 for i in range(len(box))]
        weight = self._before.box(name, box)
        return products_are_rounded(raw, weight, factor[box[axis]].reshape(along))
