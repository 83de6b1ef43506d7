"""Writing a plan's output: the shards in one pass over their bytes, every other file as it is."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from importlib.resources import as_file, files
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from normconvert.errors import RewriteError, SourceError
from normconvert.ir.event import Event, Listener
from normconvert.ir.native import MODELING_FILE
from normconvert.processes import ALONE, Processes, Seen, divide, require_same, seen
from normconvert.rewrite.evaluate import BLOCK_BYTES, Evaluator
from normconvert.rewrite.folder import MANIFEST, files_in, writing
from normconvert.rewrite.layout import Layout, Span, batches, lay_out, row_blocks
from normconvert.source import Checkpoint, Shard
from normconvert.source.checkpoint import INDEX_FILE, read_json
from normconvert.source.files import walk
from normconvert.torch_threads import torch_threads

if TYPE_CHECKING:
    from normconvert.ir.plan import Plan

_BATCH_BYTES = 16 << 20
_KEPT_BYTES = 16 << 20  # once that is freed, glibc's malloc keeps smaller blocks mapped
# Longer writes make Linux look for longer runs of free pages for the file; where memory is in
# pieces, moving others out of the way took three times as long as all the rest (6.18, ext4).
_WRITE_BYTES = 64 << 10
_NOT_SUPPORTED = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_OURS = ".normconvert-"  # so begin the notes of a conversion that is not complete
_BEGUN = f"{_OURS}begun.json"  # of what conversion a folder holds the first shards


def write(
    plan: Plan,
    checkpoint: Checkpoint,
    folder: Path,
    manifest: dict[str, Any],
    listen: Listener,
    processes: Processes = ALONE,
) -> int:
    """Write the checkpoint that `plan` describes, and `manifest`, into `folder`.

    The manifest gets the list of the other files. The folder is empty, or holds what was written
    of the same conversion before it was broken off: its complete shards stay. The others are
    divided among the `processes`, of which this is the first. Returns how many shards stayed.

    Raises:
        RewriteError: the disk is full or not writable, a value does not fit its dtype, or the
            source changed while it was read.
    """
    layouts = lay_out(plan, checkpoint)
    with writing(folder):
        conversion = _conversion(layouts, manifest)
        kept = _complete(layouts, folder, conversion)
        empty(folder, keeping=kept)
        (folder / _BEGUN).write_text(conversion)
        missing = tuple(layout for layout in layouts if layout.shard.name not in kept)
        require_space(folder, sum(layout.size for layout in missing))
        write_files(plan, checkpoint, layouts, folder, manifest)
        files = seen([*(shard.path for shard in checkpoint.shards), folder / _BEGUN])
        processes.share(partial(_write_part, missing, checkpoint, folder, files), listen)
        if _conversion(layouts, manifest) != conversion:
            raise RewriteError(f"{checkpoint.folder} changed while it was read; start again.")
        (folder / _BEGUN).unlink()
    return len(kept)


def write_files(
    plan: Plan,
    checkpoint: Checkpoint,
    layouts: tuple[Layout, ...],
    folder: Path,
    manifest: dict[str, Any],
) -> None:
    """Write all of the output but its weights, `manifest` with the list of all files included."""
    _copy_files(checkpoint, folder)
    _write_config(plan, checkpoint, folder)
    _write_index(layouts, checkpoint, folder)
    names = {*files_in(folder), *(layout.shard.name for layout in layouts)}
    listed = sorted(name for name in names if name != MANIFEST and not name.startswith(_OURS))
    whole = {**manifest, "files": listed}
    (folder / MANIFEST).write_text(json.dumps(whole, indent=1) + "\n")


def add_to_manifest(folder: Path, key: str, value: Any) -> None:
    """Note `value`, plain data, in the manifest of a folder that `write` has filled."""
    with writing(folder):
        manifest = read_json(folder / MANIFEST)
        (folder / MANIFEST).write_text(json.dumps({**manifest, key: value}, indent=1) + "\n")


def preview(plan: Plan, checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint that `write` would make, without its bytes. Its config.json is in `folder`."""
    shutil.copyfile(checkpoint.folder / "config.json", folder / "config.json")
    _write_config(plan, checkpoint, folder)
    shards = tuple(
        Shard(name=layout.shard.name, path=folder / layout.shard.name, header=layout.parsed_header)
        for layout in lay_out(plan, checkpoint)
    )
    config = read_json(folder / "config.json")
    return replace(checkpoint, folder=folder, config=config, shards=shards)


def rules_in_manifest(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The rules that an earlier conversion applied to a stock checkpoint; none if it is none."""
    try:
        plan = read_json(checkpoint.folder / MANIFEST)["plan"]
        return tuple(plan["rules"])
    except (SourceError, KeyError, TypeError):
        return ()


def _conversion(layouts: tuple[Layout, ...], manifest: dict[str, Any]) -> str:
    """What tells this conversion from every other: the plan, and which files it reads."""
    read = {}
    for layout in layouts:
        found = layout.shard.path.stat()
        read[str(layout.shard.path.resolve())] = [found.st_size, found.st_mtime_ns]
    return json.dumps({"manifest": manifest, "read": read})


def _complete(layouts: tuple[Layout, ...], folder: Path, conversion: str) -> set[str]:
    """The shards of this `conversion` that are in `folder` already.

    A shard has its name once all of it is written.
    """
    begun = folder / _BEGUN
    if not begun.is_file() or begun.read_text() != conversion:
        return set()
    return {layout.shard.name for layout in layouts if is_complete(layout, folder)}


def is_complete(layout: Layout, folder: Path) -> bool:
    """Whether the shard is in `folder`, by its size and header."""
    path = folder / layout.shard.name
    if not path.is_file() or path.stat().st_size != layout.size:
        return False
    with path.open("rb") as file:
        return file.read(len(layout.header)) == layout.header


def empty(folder: Path, *, keeping: set[str]) -> None:
    """Remove all but the files `keeping` from `folder`."""
    for name in files_in(folder):
        if name not in keeping:
            (folder / name).unlink()
    for root, folders, _ in os.walk(folder, topdown=False):
        for name in folders:
            with suppress(OSError):  # it holds a file that is kept
                Path(root, name).rmdir()


def require_space(folder: Path, needed: int) -> None:
    """Raise OSError unless the disk under `folder` has that many bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"it needs {needed:,} bytes and {free:,} are free")


def _copy_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Everything but the weights, byte for byte, folders included."""
    rewritten = {MANIFEST, *(shard.name for shard in checkpoint.shards)}
    if checkpoint.has_index:
        rewritten.add(INDEX_FILE)
    for root, names in walk(checkpoint.folder):
        (folder / root.relative_to(checkpoint.folder)).mkdir(parents=True, exist_ok=True)
        for name in names:
            path = root / name
            relative = path.relative_to(checkpoint.folder)
            if path.is_symlink() and not path.exists():
                raise RewriteError(
                    f"{path} links to a file that is not there; download it again, or remove it."
                )
            if str(relative) in rewritten or not path.is_file():
                continue
            shutil.copyfile(path, folder / relative)


def _write_config(plan: Plan, checkpoint: Checkpoint, folder: Path) -> None:
    """config.json as it was, save for the keys that the plan changes, wherever they stand."""
    if not plan.config and plan.native is None:
        return
    config = plan.changed_config(checkpoint.config)
    if plan.native is not None:
        with as_file(files("normconvert.nn") / MODELING_FILE) as path:
            shutil.copyfile(path, folder / MODELING_FILE)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_index(layouts: tuple[Layout, ...], checkpoint: Checkpoint, folder: Path) -> None:
    """The index as it was, byte for byte, unless tensors were added or changed their size."""
    if not checkpoint.has_index:
        return
    index = read_json(checkpoint.folder / INDEX_FILE)
    weight_map = {p.name: layout.shard.name for layout in layouts for p in layout.tensors}
    total = sum(placed.nbytes for layout in layouts for placed in layout.tensors)
    if weight_map == index["weight_map"] and total == checkpoint.nbytes:
        shutil.copyfile(checkpoint.folder / INDEX_FILE, folder / INDEX_FILE)
        return
    kept = {name: shard for name, shard in index["weight_map"].items() if name in weight_map}
    index["weight_map"] = {**kept, **weight_map}
    metadata = index.get("metadata")
    index["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _write_part(
    layouts: tuple[Layout, ...],
    checkpoint: Checkpoint,
    folder: Path,
    files: Seen,
    rank: int,
    count: int,
    listen: Listener,
) -> None:
    """What the process of that `rank` writes of `layouts`, of so many that do."""
    require_same(files)
    part = divide(layouts, count, lambda layout: layout.size)[rank]
    write_shards(part, checkpoint, folder, listen, durably=count > 1)


def write_shards(
    layouts: tuple[Layout, ...],
    checkpoint: Checkpoint,
    folder: Path,
    listen: Listener,
    *,
    durably: bool = False,
) -> None:
    """One pass over the shards on a small pool; torch and the disk leave the GIL.

    The last one reaches the disk with the folder, unless it is to be written `durably`.
    """
    total = sum(placed.nbytes for layout in layouts for placed in layout.tensors)
    done = 0
    for layout in layouts:
        _create(_partial(folder / layout.shard.name), layout)
    torch.empty(_KEPT_BYTES, dtype=torch.uint8)
    with ExitStack() as stack:
        evaluator = stack.enter_context(Evaluator(checkpoint))
        # The pool's threads work side by side; torch must not start more for each of them.
        stack.enter_context(torch_threads(1))
        pool = ThreadPoolExecutor(os.cpu_count())
        stack.callback(pool.shutdown, cancel_futures=True)
        futures: dict[Future[int], Path] = {}
        for layout in layouts:
            target = folder / layout.shard.name
            for spans in batches(layout, _BATCH_BYTES):
                given = (spans, evaluator, layout.shard.path, _partial(target))
                futures[pool.submit(_write_spans, *given)] = target
        waiting = Counter(futures.values())
        for empty in {folder / layout.shard.name for layout in layouts} - set(waiting):
            _finish(empty, durably=False)
        for future in as_completed(futures):
            done += future.result()
            listen(Event("writing", done, total))
            target = futures[future]
            waiting[target] -= 1
            if not waiting[target]:
                _finish(target, durably=durably or waiting.total() > 0)


def _finish(shard: Path, *, durably: bool) -> None:
    """Give a shard that is complete its name."""
    if durably:  # or another run would take it for complete after the machine has failed
        with _partial(shard).open("rb") as file:
            os.fsync(file.fileno())
    _partial(shard).rename(shard)


def _partial(shard: Path) -> Path:
    """Where a shard is while it is being written."""
    return shard.with_name(f"{shard.name}.partial")


def _create(path: Path, layout: Layout) -> None:
    """A shard's file with its header, at its full size and, where the system can, with its place
    on the disk: then a full disk shows at once, and the writes are a third cheaper (ext4).
    """
    with path.open("xb", buffering=0) as file:
        _write_all(file.fileno(), [layout.header], 0)
        file.truncate(layout.size)
        try:
            os.posix_fallocate(file.fileno(), 0, layout.size)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _NOT_SUPPORTED:
                raise


def _write_spans(spans: list[Span], evaluator: Evaluator, source: Path, target: Path) -> int:
    """Write neighbouring spans; the small ones together, as a write costs more than a copy."""
    start = end = spans[0].start
    waiting: list[bytes | memoryview] = []
    nbytes = 0
    with source.open("rb", buffering=0) as reading, target.open("r+b", buffering=0) as writing:
        for span in spans:
            copied = 0
            if span.edit is None and span.nbytes >= BLOCK_BYTES // 2:
                end = _write_all(writing.fileno(), waiting, end)
                waiting, nbytes = [], 0
                copied = _copied(reading.fileno(), span, writing.fileno(), end)
                end += copied
            for data in _blocks(replace(span, first=span.first + copied), evaluator, reading):
                waiting.append(data)
                nbytes += len(data)
                if nbytes >= BLOCK_BYTES // 2:
                    end = _write_all(writing.fileno(), waiting, end)
                    waiting, nbytes = [], 0
        end = _write_all(writing.fileno(), waiting, end)
    return end - start


def _copied(source: int, span: Span, target: int, end: int) -> int:
    """How much of an unchanged span the kernel has copied by itself, to byte `end` of the target.

    Less than all of it where the system or the two file systems cannot do that.
    """
    done = 0
    try:
        while done < span.nbytes:
            left = span.nbytes - done
            count = os.copy_file_range(source, target, left, span.first + done, end + done)
            if count == 0:
                break
            done += count
    except (AttributeError, OSError):  # what is really wrong shows when it is read and written
        pass
    return done


def _blocks(span: Span, evaluator: Evaluator, source: FileIO) -> Iterator[bytes | memoryview]:
    for first, last in row_blocks(span.first, span.last, span.row_bytes, BLOCK_BYTES):
        if span.edit is None:
            yield _stored(source, first, last)
        else:
            rows = evaluator.rows(span.edit, first, last)
            yield rows.view(-1).view(torch.uint8).numpy().data


def _stored(file: FileIO, start: int, stop: int) -> bytes:
    data = os.pread(file.fileno(), stop - start, start)
    if len(data) < stop - start:
        raise RewriteError(f"{file.name} became shorter while it was read.")
    return data


def _write_all(file: int, parts: list[bytes | memoryview], offset: int) -> int:
    """Write `parts` from `offset` on; return where they end."""
    data = memoryview(parts[0] if len(parts) == 1 else b"".join(parts))
    while data:
        until_boundary = _WRITE_BYTES - offset % _WRITE_BYTES
        written = os.pwrite(file, data[:until_boundary], offset)
        data, offset = data[written:], offset + written
    return offset
