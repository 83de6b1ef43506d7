"""What can be known of parameters that one forward pass on text does not read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


def widths(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    """The features that layers read: a weight multiplies them, a bias or an embedding none."""
    for path, module in model.named_modules(remove_duplicate=False):
        for kind, width in _WIDTHS:
            if isinstance(module, kind):
                for name, _ in module.named_parameters(path, recurse=False):
                    read = getattr(module, width) if width and name.endswith("weight") else 0
                    yield name, read


_WIDTHS = (
    (torch.nn.Linear, "in_features"),
    (Conv1D, "nx"),
    (torch.nn.modules.conv._ConvNd, "in_channels"),
    (torch.nn.Embedding, ""),
)
