"""Whether a model is of the size of its checkpoint, found out while it is built."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch.nn.modules.module import register_module_parameter_registration_hook

from normconvert.errors import TraceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from normconvert.source import Checkpoint

_MOST_PER_TENSOR, _MOST_BESIDES = 10, 10_000  # some are made twice, some are not stored


@contextmanager
def of_the_size(checkpoint: Checkpoint) -> Iterator[None]:
    """Inside, a model with far more parameters than `checkpoint` has tensors is not built.

    A config.json may ask for ten million layers, which not even without weights fit into memory.

    Raises:
        TraceError: that is what it asks for.
    """
    most, count = _MOST_PER_TENSOR * len(checkpoint.tensors) + _MOST_BESIDES, 0

    def note(*_: object) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise TraceError(
                f"{checkpoint.folder / 'config.json'} describes a model of more than {most:,} "
                f"parameters, and there are {len(checkpoint.tensors):,} tensors; do the two "
                "belong together?"
            )

    handle = register_module_parameter_registration_hook(note)
    try:
        yield
    finally:
        handle.remove()
