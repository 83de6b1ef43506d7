"""Writing a plan's output: the shards in one pass over their bytes, every other file as it is."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from normconvert.errors import RewriteError
from normconvert.ir.event import Event, Listener
from normconvert.rewrite.evaluate import BLOCK_BYTES, Evaluator, row_blocks
from normconvert.rewrite.folder import cannot_write
from normconvert.rewrite.layout import Layout, Placed, lay_out
from normconvert.source.checkpoint import INDEX_FILE, Checkpoint, read_json

if TYPE_CHECKING:
    from normconvert.ir.plan import Edit, Plan

MANIFEST = "normconvert.json"
_COPY_BYTES = 64 << 20
_NOT_SUPPORTED = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_LEFT_OUT = frozenset({".git", ".cache"})  # of a clone or a download, not of the checkpoint


def write(
    plan: Plan,
    checkpoint: Checkpoint,
    folder: Path,
    manifest: dict[str, Any],
    listen: Listener,
) -> None:
    """Write the checkpoint that `plan` describes, and `manifest`, into the empty `folder`.

    Raises:
        RewriteError: the disk is full or not writable, a value does not fit its dtype, or the
            source changed while it was read.
    """
    layouts = lay_out(plan, checkpoint)
    try:
        _require_space(folder, sum(layout.size for layout in layouts))
        _copy_files(checkpoint, folder)
        _write_config(plan, checkpoint, folder)
        _write_shards(layouts, checkpoint, folder, listen)
        _write_index(layouts, checkpoint, folder)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    except OSError as error:
        raise cannot_write(folder, error) from error


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"it needs {needed:,} bytes and {free:,} are free")


def _copy_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Everything but the weights, byte for byte, folders included."""
    rewritten = {INDEX_FILE, MANIFEST, *(shard.name for shard in checkpoint.shards)}
    for root, folders, names in os.walk(checkpoint.folder):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        for name in names:
            path = Path(root, name)
            relative = path.relative_to(checkpoint.folder)
            if str(relative) in rewritten or not path.is_file():
                continue
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _write_config(plan: Plan, checkpoint: Checkpoint, folder: Path) -> None:
    """config.json as it was, save for the keys that the plan changes, wherever they stand."""
    if not plan.config:
        return
    config = dict(checkpoint.config)
    for key, value in plan.config:
        config[key] = value
        for name, section in config.items():
            if isinstance(section, dict) and key in section:
                config[name] = {**section, key: value}
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
    index["weight_map"] = {**index["weight_map"], **weight_map}
    index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _write_shards(
    layouts: tuple[Layout, ...], checkpoint: Checkpoint, folder: Path, listen: Listener
) -> None:
    """One pass over all shards on a small pool; torch, the disk and the copies leave the GIL."""
    total = sum(placed.nbytes for layout in layouts for placed in layout.tensors)
    done = 0
    with ExitStack() as stack:
        evaluator = stack.enter_context(Evaluator(checkpoint))
        stack.enter_context(_one_torch_thread())
        pool = ThreadPoolExecutor(os.cpu_count())
        stack.callback(pool.shutdown, cancel_futures=True)
        futures: list[Future[int]] = []
        for layout in layouts:
            source, target = _open(stack, layout, folder)
            futures += [pool.submit(_copy, source, target, *piece) for piece in _copies(layout)]
            for placed in layout.tensors:
                if placed.edit is not None:
                    for start, stop in row_blocks(placed.edit.shape, placed.edit.itemsize):
                        work = (evaluator, target, placed, placed.edit, start, stop)
                        futures.append(pool.submit(_compute, *work))
        for future in as_completed(futures):
            done += future.result()
            listen(Event("writing", done, total))


def _open(stack: ExitStack, layout: Layout, folder: Path) -> tuple[int, int]:
    """File descriptors of the source's shard and of the output's, the latter at its full size."""
    source = os.open(layout.shard.path, os.O_RDONLY)
    stack.callback(os.close, source)
    target = os.open(folder / layout.shard.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    stack.callback(os.close, target)
    os.ftruncate(target, layout.size)
    os.pwrite(target, layout.header, 0)
    return source, target


def _copies(layout: Layout) -> Iterator[tuple[int, int, int]]:
    """Neighbouring unchanged tensors as (source offset, target offset, bytes), in pieces."""
    runs: list[tuple[int, int, int]] = []
    for placed in layout.tensors:
        if placed.edit is not None:
            continue
        if runs and runs[-1][0] + runs[-1][2] == placed.source_start:
            source, target, count = runs.pop()
            runs.append((source, target, count + placed.nbytes))
        else:
            runs.append((placed.source_start, placed.start, placed.nbytes))
    for source, target, count in runs:
        for offset in range(0, count, _COPY_BYTES):
            yield source + offset, target + offset, min(_COPY_BYTES, count - offset)


def _copy(source: int, target: int, start: int, to: int, count: int) -> int:
    """Copy bytes between files without bringing them into the process where the kernel can."""
    left = count
    try:
        while left:
            moved = os.copy_file_range(source, target, left, start, to)
            if moved == 0:
                break
            start, to, left = start + moved, to + moved, left - moved
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NOT_SUPPORTED:
            raise
    while left:
        piece = os.pread(source, min(left, BLOCK_BYTES), start)
        if not piece:
            raise RewriteError("The source became shorter while it was read.")
        _write_all(target, memoryview(piece), to)
        start, to, left = start + len(piece), to + len(piece), left - len(piece)
    return count


def _compute(
    evaluator: Evaluator, target: int, placed: Placed, edit: Edit, start: int, stop: int
) -> int:
    rows = evaluator.rows(edit, start, stop)
    data = memoryview(rows.view(torch.uint8).numpy()).cast("B")
    row_bytes = placed.nbytes // max(1, math.prod(edit.shape[:-1]))
    _write_all(target, data, placed.start + start * row_bytes)
    return len(data)


def _write_all(target: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(target, data, offset)
        data, offset = data[written:], offset + written


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The pool's threads work side by side; torch must not start more for each of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
