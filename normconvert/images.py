"""Images as a model's code reads them, and what it must be told of them.

transformers has one name for one thing in all of its architectures, so a parameter's name says in
which of a few ways images are read: whole, as tiles, or cut into patches of any number.
"""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from normconvert.errors import TraceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

Images: TypeAlias = "tuple[tuple[int, ...], dict[str, torch.Tensor]]"
"""The shape of the pixels, and numbers beside them, by the names that their parameters have."""

GRIDS = frozenset({"grid_thw", "image_grid_thw", "image_grid_hw"})
"""Parameters that only what reads patches of all images in one row has."""


def accepted(run: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the parameters of `run`."""
    return tuple(inspect.signature(run).parameters)


def images(model: PreTrainedModel, batch: int) -> Images:
    """Images that `model` can read: `batch` of them, but two where they may differ in size.

    Raises:
        TraceError: the model's config does not say which size they have.
    """
    names = accepted(model.forward)
    with unset_fake_temporarily():  # the model's code must know the numbers
        for name, cut in _WAYS.items():
            if name in names:
                return cut(model, batch)
        return _whole(model, batch)


def told(run: Callable[..., Any], numbers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of the `numbers` beside images that `run` takes; sizes only if it needs them.

    Where they may be left out, not every tower takes them.
    """
    known = inspect.signature(run).parameters
    needed = (name for name, each in known.items() if each.default is each.empty)
    wanted = {name for name in known if name != _SIZES}.union(needed)
    return {name: given for name, given in numbers.items() if name in wanted}


_SIZES = "image_sizes"


def _whole(model: PreTrainedModel, batch: int) -> Images:
    size = setting(model, "image_size")
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    shape = batch, _channels(model), height, width
    return shape, {_SIZES: torch.tensor([[height, width]] * batch)}


def _tiles(model: PreTrainedModel, batch: int) -> Images:
    """One image for each sequence, of as many tiles as it may have."""
    (_, *shape), _ = _whole(model, batch)
    tiles = setting(model, "max_num_tiles")
    return (batch, 1, tiles, *shape), {
        "aspect_ratio_ids": torch.ones(batch, 1, dtype=torch.int64),
        "aspect_ratio_mask": torch.ones(batch, 1, tiles, dtype=torch.int64),
    }


def _row(model: PreTrainedModel, _: int) -> Images:
    """The patches of all images, one after the other."""
    merge = getattr(model.config, "spatial_merge_size", _MERGE)
    sides = torch.tensor([[3, 5], [2, 1]]) * merge  # 17 merged, which no size is
    grid = torch.cat([torch.ones(len(sides), 1, dtype=sides.dtype), sides], dim=1)
    merges = torch.full((len(sides),), merge)
    return (int(sides.prod(1).sum()), math.prod(patch_shape(model))), {
        "grid_thw": grid,
        "image_grid_thw": grid,
        "image_grid_hw": sides,
        "merge_sizes": merges,
        "image_merge_sizes": merges,
    }


def _strip(model: PreTrainedModel, _: int) -> Images:
    """The patches of all images, side by side, as one image that is a patch high."""
    sides = _sides()
    _, channels, height, width = _first(model).shape
    return (1, channels, height, width * int(sides.prod(1).sum())), {
        "target_sizes": sides,
        "tgt_sizes": sides,
    }


def _padded(model: PreTrainedModel, _: int) -> Images:
    """The patches of each image, as many as the largest one has."""
    sides = _sides()
    counts = sides.prod(1)
    most = int(counts.max())
    mask = (torch.arange(most) < counts[:, None]).to(torch.int64)
    return (len(sides), most, math.prod(patch_shape(model))), {
        "spatial_shapes": sides,
        "pixel_attention_mask": mask,
    }


def _placed(model: PreTrainedModel, batch: int) -> Images:
    """The patches of each image, and where they are in it."""
    side = 3 * _MERGE
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(batch, -1, 2)
    return (batch, side * side, math.prod(patch_shape(model))), {
        "pixel_position_ids": places,
        "image_position_ids": places,
    }


_WAYS: dict[str, Callable[[PreTrainedModel, int], Images]] = {
    "aspect_ratio_ids": _tiles,
    "spatial_shapes": _padded,
    "pixel_position_ids": _placed,
    "target_sizes": _strip,
    "tgt_sizes": _strip,
    **dict.fromkeys(sorted(GRIDS), _row),
}
"""By a parameter that only those have who read images so."""

_MERGE = 4
"""How many patches a side has at least: code that merges them takes two, or twice two."""


def _sides() -> torch.Tensor:
    return _MERGE * torch.tensor([[3, 5], [2, 1]])


def patch_shape(model: PreTrainedModel) -> tuple[int, ...]:
    """The pixels of a patch, as the layer that reads them has them."""
    return tuple(_first(model).shape[1:])


def _first(model: PreTrainedModel) -> torch.Tensor:
    """The weight of the layer that reads the pixels."""
    layers = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
    return next(m.weight for m in model.modules() if isinstance(m, layers))


def _channels(model: PreTrainedModel) -> int:
    first = _first(model)
    return int(setting(model, "num_channels") if first.ndim == _OF_A_LINEAR else first.shape[1])


_OF_A_LINEAR = 2  # axes of its weight; a convolution's second one is of channels


def setting(model: PreTrainedModel, name: str) -> Any:
    """The value of `name` in the model's config, or in that of one of its parts.

    Raises:
        TraceError: none of them has one.
    """
    config = model.config
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        if getattr(part, name, None) is not None:
            return getattr(part, name)
    raise TraceError(
        f"The config of {type(model).__name__} has no {name}: what size its inputs have is not "
        "known."
    )
