"""Parts of the tensors of a checkpoint, read from its files as they are needed."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from normconvert.errors import VerificationError
from normconvert.source.checkpoint import opened

if TYPE_CHECKING:
    from pathlib import Path

    from normconvert.source import Checkpoint

Raw: TypeAlias = "npt.NDArray[Any]"
Box: TypeAlias = "tuple[slice, ...]"

_DTYPE = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}


class Stored:
    """Reads from the files of `checkpoint`, from several threads if need be."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tensors = checkpoint.tensors
        self._paths = checkpoint.paths
        self._files: dict[Path, int] = {}

    def __enter__(self) -> Stored:
        for path in set(self._paths.values()):
            self._files[path] = opened(path)
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            os.close(file)

    def box(self, name: str, box: Box) -> Raw:
        """A part of a floating-point tensor, bfloat16 as unsigned integers of 16 bits.

        Raises:
            VerificationError: the file became shorter.
        """
        shape = self.tensors[name].shape
        sizes = [each.stop - each.start for each in box]
        # In one piece: all of the axes behind the first that the box has more than one place of.
        split = next((axis for axis, size in enumerate(sizes) if size != 1), len(shape))
        inner = math.prod(shape[split + 1 :])
        place = 0
        for axis in range(min(split + 1, len(shape))):
            place += box[axis].start * math.prod(shape[axis + 1 :])
        count = inner * sizes[split] if split < len(shape) else 1
        dtype = np.dtype(_DTYPE[self.tensors[name].dtype])
        raw = np.frombuffer(
            self.bytes(name, place * dtype.itemsize, (place + count) * dtype.itemsize), dtype
        )
        whole = raw.reshape((*sizes[: split + 1], *shape[split + 1 :]))
        everything = (slice(None),) * (split + 1)
        return whole[everything + box[split + 1 :]] if split < len(shape) else whole

    def bytes(self, name: str, start: int, stop: int) -> bytearray:
        """The bytes from `start` to `stop` of a tensor.

        Raises:
            VerificationError: the file became shorter.
        """
        path = self._paths[name]
        data = bytearray(stop - start)
        left, offset = memoryview(data), self.tensors[name].start + start
        while left:
            count = os.preadv(self._files[path], [left], offset)
            if count == 0:
                raise VerificationError(f"{path} became shorter while it was read.")
            left, offset = left[count:], offset + count
        return data


def decode(raw: Raw, dtype: str) -> npt.NDArray[np.float64]:
    """Stored numbers in float64, exactly."""
    if dtype == "BF16":
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float64)
