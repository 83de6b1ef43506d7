"""Tensors of a Hub repository that are not on this machine: read by range requests, or fetched.

The commit is pinned, so what is read today and tomorrow is the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from normconvert.errors import SourceError
from normconvert.source.header import (
    File,
    Header,
    Shard,
    encode_header,
    parse_header,
    read_header,
)
from normconvert.source.hub import fetch_weights, refusals

if TYPE_CHECKING:
    from normconvert.source.checkpoint import Checkpoint

_HEADER_BYTES = 1 << 17  # asked for at once: nearly every header is shorter
_PIECE_BYTES = 8 << 20
_CONNECTIONS = 8
_ALL = 200  # of HTTP: the whole file, where a part would be 206
_PASSES = (408, 429, 500, 502, 503, 504)  # worth another try; not every version tries them all


def remote_headers(model: str, commit: str, names: list[str]) -> list[Header]:
    """The headers of files of a repository, checked as those of local files; no more is read.

    Raises:
        SourceError: a file is damaged, or the Hub does not give it.
    """
    with refusals(model):
        _require_ranges(model, commit, names[0])
        with _connections() as pool:
            return list(pool.map(partial(_header, model, commit), names))


def download(checkpoint: Checkpoint) -> None:
    """Have all weights of `checkpoint` on the disk; those of the Hub in its cache.

    Raises:
        SourceError: they cannot be had, or are not what their headers said.
    """
    missing = [shard for shard in checkpoint.shards if not shard.path.is_file()]
    if missing and checkpoint.commit is not None:
        names = (shard.name for shard in missing)
        fetch_weights(checkpoint.model, checkpoint.commit, names)
        for shard in missing:
            _require_same(shard, shard.path)


@contextmanager
def at_hand(
    checkpoint: Checkpoint,
    tensors: Iterable[str],
    shard: Shard | None = None,
    folder: Path | None = None,
) -> Iterator[Checkpoint]:
    """`checkpoint` with nothing but what is on the disk: at least `tensors` and all of `shard`.

    What is not there yet is fetched, and removed at the end: the shard as a file, tensors of other
    shards by themselves, into one safetensors file. Both lie in a new folder in `folder`.

    Raises:
        SourceError: it cannot be fetched.
    """
    here = [each for each in checkpoint.shards if each.path.is_file()]
    if checkpoint.commit is None or len(here) == len(checkpoint.shards):
        yield checkpoint
        return
    with TemporaryDirectory(dir=folder, prefix="source-") as name:
        with refusals(checkpoint.model):
            if shard is not None and not shard.path.is_file():
                here.append(_fetched(checkpoint, shard, Path(name) / "shard"))
            known = {tensor.name for each in here for tensor in each.header.tensors}
            if wanted := set(tensors) - known:
                here.append(_borrowed(checkpoint, wanted, Path(name) / "borrowed"))
        yield replace(checkpoint, shards=tuple(here))


def _fetched(checkpoint: Checkpoint, shard: Shard, folder: Path) -> Shard:
    from huggingface_hub import hf_hub_download

    place = (checkpoint.model, shard.name)
    path = Path(hf_hub_download(*place, revision=checkpoint.commit, local_dir=folder))
    _require_same(shard, path)
    return replace(shard, path=path)


def _require_same(shard: Shard, path: Path) -> None:
    if read_header(path) != shard.header:
        raise SourceError(
            f"{path} is not the file whose header the Hub had sent; remove it and try again."
        )


def _borrowed(checkpoint: Checkpoint, names: set[str], path: Path) -> Shard:
    """A file at `path` that holds the tensors `names` alone, byte for byte."""
    found = [
        (shard.name, tensor)
        for shard in checkpoint.shards
        for tensor in shard.header.tensors
        if tensor.name in names
    ]
    header = encode_header([(t.name, t.dtype, t.shape) for _, t in found], None)
    pieces = []
    end = len(header)
    for shard, tensor in found:
        for start in range(tensor.start, tensor.stop, _PIECE_BYTES):
            stop = min(start + _PIECE_BYTES, tensor.stop)
            pieces.append((shard, start, stop, end))
            end += stop - start
    with path.open("xb", buffering=0) as file, _connections() as pool:
        os.pwrite(file.fileno(), header, 0)
        os.truncate(file.fileno(), end)

        def copy(piece: tuple[str, int, int, int]) -> None:
            shard, start, stop, at = piece
            assert checkpoint.commit is not None
            data = memoryview(_read(checkpoint.model, checkpoint.commit, shard, start, stop))
            while data:
                written = os.pwrite(file.fileno(), data, at)
                data, at = data[written:], at + written

        for _ in pool.map(copy, pieces):
            pass
    return Shard(name="", path=path, header=read_header(path))  # no other shard has this name


def _header(model: str, commit: str, name: str) -> Header:
    first, size = _range(model, commit, name, 0, _HEADER_BYTES)

    def read(start: int, stop: int) -> bytes:
        if stop <= len(first) or len(first) == size:
            return first[start:stop]
        return _read(model, commit, name, start, stop)

    place = f"{name} of {model} on the Hub"
    return parse_header(File(name=place, size=size, read=read, remedy="Give another --revision."))


def _read(model: str, commit: str, name: str, start: int, stop: int) -> bytes:
    data, _ = _range(model, commit, name, start, stop)
    if len(data) != stop - start:
        raise SourceError(f"The Hub sent another part of {name} of {model} than was asked for.")
    return data


def _range(model: str, commit: str, name: str, start: int, stop: int) -> tuple[bytes, int]:
    """The bytes of a file from `start` to `stop`, or to its end, and the size of all of it."""
    from huggingface_hub import hf_raise_for_status
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.utils import http_backoff  # type: ignore[attr-defined]

    url, headers = _request(model, commit, name, start, stop)
    response = http_backoff(
        "GET",
        url,
        headers=headers,
        timeout=HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_status_codes=_PASSES,
    )
    hf_raise_for_status(response)
    return response.content, int(response.headers["Content-Range"].rpartition("/")[2])


def _require_ranges(model: str, commit: str, name: str) -> None:
    """Refuse a server that answers every request with the whole file, before it sends one."""
    from huggingface_hub import hf_raise_for_status
    from huggingface_hub.utils import http_stream_backoff  # type: ignore[attr-defined]

    url, headers = _request(model, commit, name, 0, 8)
    with http_stream_backoff(
        "GET", url, headers=headers, retry_on_status_codes=_PASSES
    ) as response:
        if response.status_code == _ALL:
            raise SourceError(
                f"The server of {model} sends no parts of files, so its headers cannot be read by "
                "themselves; download it, and give the folder."
            )
        hf_raise_for_status(response)


def _request(
    model: str, commit: str, name: str, start: int, stop: int
) -> tuple[str, dict[str, str]]:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    wanted = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    return hf_hub_url(model, name, revision=commit), {**build_hf_headers(), **wanted}


@contextmanager
def _connections() -> Iterator[ThreadPoolExecutor]:
    """A few threads to wait for the Hub; what waits for them is dropped when one fails."""
    with ExitStack() as stack:
        pool = ThreadPoolExecutor(_CONNECTIONS)
        stack.callback(pool.shutdown, cancel_futures=True)
        yield pool
