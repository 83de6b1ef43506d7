"""What can be known of parameters that one forward pass on text does not read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers.pytorch_utils import Conv1D

from normconvert.model_inputs import GRID, main_input, towers, trace_inputs
from normconvert.trace.caches import forgetting
from normconvert.trace.naming import readable_numbers
from normconvert.trace.recorder import Recorder

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


def for_images(model: PreTrainedModel, batch: int, length: int) -> tuple[str, ...]:
    """The parameters that are read where images become what the text model reads, if that runs."""
    found: set[str] = set()
    for path, tower in towers(model).items():
        parts = [
            part
            for name, part in model.named_modules()
            if path.startswith(f"{name}." if name else "") and hasattr(part, "get_image_features")
        ]
        for sized in (False, True):  # some towers must be told, and others must not
            recorder = Recorder()
            recorder.computes = True
            try:
                _become_text(model, parts[-1], tower, recorder, (batch, length), sized=sized)
            except Exception:  # foreign code, that may want more than the images
                continue
            read = {value for node in recorder.nodes for value in node.inputs}
            named = model.named_parameters(remove_duplicate=False)
            found |= {name for name, parameter in named if recorder.known(parameter) in read}
            break
    return tuple(sorted(found))


def _become_text(
    model: PreTrainedModel,
    part: Any,
    tower: PreTrainedModel,
    recorder: Recorder,
    shape: tuple[int, int],
    *,
    sized: bool,
) -> None:
    """Record what `part` of `model` makes of the images that its `tower` reads."""
    with torch.device(model.device), forgetting(model), readable_numbers():
        inputs = trace_inputs(tower, *shape)
        images = inputs[main_input(tower)]
        given = {"image_grid_thw": inputs[GRID]} if GRID in inputs else {}
        if sized:
            with unset_fake_temporarily():  # the model's code must know the numbers
                given["image_sizes"] = torch.tensor([list(images.shape[-2:])] * len(images))
        with recorder:
            part.get_image_features(images, **given)
