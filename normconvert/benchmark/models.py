"""The models that are compared: loaded as a user loads them, and without their norms."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from normconvert.errors import BenchError, first_line
from normconvert.model_class import resolve

if TYPE_CHECKING:
    from normconvert.ir.graph import Graph
    from normconvert.source import Checkpoint


def load(
    checkpoint: Checkpoint, dtype: torch.dtype | None, device: torch.device, trust: bool
) -> Any:
    """The model of `checkpoint` on `device`, in `dtype` or else as it is stored.

    Raises:
        BenchError: it cannot be loaded, or not whole.
    """
    model_class, config = resolve(checkpoint, trust)
    try:
        model, info = model_class.from_pretrained(
            checkpoint.folder, config=config, dtype=dtype or "auto", output_loading_info=True
        )
        model.to(device)
    except Exception as error:  # transformers and model code may raise anything
        raise BenchError(
            f"transformers cannot load {checkpoint.folder}: {first_line(error)}."
        ) from error
    if incomplete := sorted(info["missing_keys"]):
        raise BenchError(
            f"{checkpoint.folder} does not load whole: {incomplete[0]!r} is missing "
            f"({len(incomplete)} such tensors)."
        )
    return model.eval()


def removable(graph: Graph) -> tuple[str, ...]:
    """The paths of the norms that the ceiling does without: all whose formula is known."""
    return tuple(norm.module for norm in graph.norms if norm.kind != "unrecognised")


def without_norms(model: Any, paths: tuple[str, ...]) -> Any:
    """A copy of `model` whose modules at `paths`, under whatever other path too, do nothing.

    It computes nothing of use; it takes the time that is left when norms cost none.
    """
    ceiling = copy.deepcopy(model)
    norms = {id(ceiling.get_submodule(path)) for path in paths}
    for parent in list(ceiling.modules()):
        for name, child in parent.named_children():
            if id(child) in norms:
                setattr(parent, name, nn.Identity())
    return ceiling


def nbytes(model: Any) -> int:
    """Bytes of the parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in tensors)
