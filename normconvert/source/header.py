"""The header of a safetensors file, read and written strictly.

A file is: 8 bytes little-endian length n, n bytes of JSON, then the tensors without gaps.
The library's own reader does not tell where a tensor's bytes lie, and that is all that a
streaming rewrite needs. (Format: https://github.com/huggingface/safetensors#format)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normconvert.errors import SourceError
from normconvert.ir.plan import DTYPE_BYTES

_LONGEST_HEADER = 100_000_000  # the limit of the safetensors library itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """Where one tensor lies: bytes `start` to `stop` of the file, header included."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The tensors of one file in the order of their bytes, and its metadata."""

    tensors: tuple[Tensor, ...]
    metadata: tuple[tuple[str, str], ...] | None
    data_start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One safetensors file of the checkpoint; `name` is relative to the folder.

    The weights of a Hub repository need not be on this machine: then there is no file at `path`.
    """

    name: str
    path: Path
    header: Header


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file to read a header from, wherever it is.

    `read` gives the bytes from a start to a stop, fewer where the file ends before. `remedy` is
    what to do if the file is damaged, as a sentence.
    """

    name: str
    size: int
    read: Callable[[int, int], bytes]
    remedy: str


def read_header(path: Path) -> Header:
    """Read and check the header of the safetensors file `path`.

    Raises:
        SourceError: the file is missing, truncated or damaged; the message names it.
    """
    try:
        with path.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size

            def read(start: int, stop: int) -> bytes:
                opened.seek(start)
                return opened.read(stop - start)

            remedy = "Download the file again."
            return parse_header(File(name=str(path), size=size, read=read, remedy=remedy))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}.") from error


def parse_header(file: File) -> Header:
    """Read and check the header of the safetensors file `file`, and nothing else of it.

    Raises:
        SourceError: the file is truncated or damaged; the message names it.
    """
    prefix = file.read(0, 8)
    if prefix == b"version ":
        raise SourceError(
            f"{file.name} is a Git LFS pointer to the weights; fetch them with `git lfs pull`."
        )
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(file.size - 8, _LONGEST_HEADER):
        raise _damaged(file, "its first 8 bytes are not the length of a header")
    entries = _parse(file, file.read(8, 8 + length))
    metadata = entries.pop("__metadata__", None)
    data_start = 8 + length
    tensors = sorted(
        (_tensor(file, name, entry, data_start) for name, entry in entries.items()),
        key=lambda tensor: (tensor.start, tensor.stop),
    )
    end = data_start
    for tensor in tensors:
        if tensor.start != end:
            raise _damaged(file, f"the bytes of {tensor.name!r} overlap or leave a gap")
        end = tensor.stop
    if end != file.size:
        found = "truncated" if end > file.size else "followed by bytes that belong to no tensor"
        raise _damaged(file, f"it should have {end} bytes and has {file.size}: it is {found}")
    return Header(
        tensors=tuple(tensors),
        metadata=None if metadata is None else _metadata(file, metadata),
        data_start=data_start,
    )


def encode_header(
    tensors: list[tuple[str, str, tuple[int, ...]]],
    metadata: tuple[tuple[str, str], ...] | None,
) -> bytes:
    """The first bytes of a file that holds `tensors` (name, dtype, shape) in this order.

    Padded with spaces to a multiple of 8, as the safetensors library does.
    """
    entries: dict[str, Any] = {}
    if metadata is not None:
        entries["__metadata__"] = dict(metadata)
    offset = 0
    for name, dtype, shape in tensors:
        stop = offset + math.prod(shape) * DTYPE_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parse(file: File, text: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
        json.dumps(entries, ensure_ascii=False).encode()  # "\\ud800" is JSON, but no character
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _damaged(file, "its header is not a JSON object")
    return entries


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _tensor(file: File, name: str, entry: Any, data_start: int) -> Tensor:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(file, f"the entry of {name!r} lacks dtype, shape or offsets") from error
    counts = [start, stop, *(shape if isinstance(shape, list) else [None])]
    if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
        raise _damaged(file, f"shape or offsets of {name!r} are not natural numbers")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise SourceError(
            f"{file.name} stores {name!r} as {dtype!r}, a dtype that normconvert does not know; "
            "convert an unquantised checkpoint instead."
        )
    if math.prod(shape) * DTYPE_BYTES[dtype] != stop - start:
        raise _damaged(file, f"{name!r} has {stop - start} bytes, not those of its shape {shape}")
    return Tensor(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        start=data_start + start,
        stop=data_start + stop,
    )


def _metadata(file: File, metadata: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(file, "its __metadata__ is not a map of strings")
    return tuple(metadata.items())


def _damaged(file: File, what: str) -> SourceError:
    return SourceError(f"{file.name} is not a whole safetensors file: {what}. {file.remedy}")
