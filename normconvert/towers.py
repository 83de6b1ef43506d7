"""The parts of a model of text that read images or spectra, and what each is run on.

A pass on text runs none of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from normconvert.errors import TraceError
from normconvert.images import accepted, images, patch_shape, setting, told
from normconvert.model_inputs import (
    MAIN_INPUTS,
    in_patches,
    main_input,
    main_shape,
    plain_inputs,
    trace_inputs,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel


def images_beside(model: PreTrainedModel, batch: int) -> dict[str, Any]:
    """Images, zeros, for a model of text that cannot do without, and what it must be told of them.

    Raises:
        TraceError: it reads none, or the config does not say which size they have.
    """
    towers_for_images = (
        tower for tower in towers(model).values() if main_input(tower) != "input_features"
    )
    tower = next(towers_for_images, None)
    if tower is None or "pixel_values" not in accepted(model.forward):
        raise TraceError(f"{type(model).__name__} reads no images.")
    shape, numbers = images(tower, batch)
    with torch.device(model.device):
        pixels = torch.zeros(shape, dtype=model.dtype)
    return {"pixel_values": pixels, **told(model.forward, numbers)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """Something to run beside a model of text: `run`, on `inputs`, which are zeros but for numbers.

    `name` is the path of what is run, empty if that is the whole model; `what` it is run on;
    `tower` is the path of the tower that reads the images. `alone` says that this is run by itself;
    what it returns of its inside, others than this model may read.
    """

    name: str
    what: str
    tower: str
    part: PreTrainedModel
    run: Callable[..., Any]
    inputs: dict[str, Any]
    alone: bool


def towers(model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """The parts of a model of text that read images or spectra instead, by their paths."""
    from transformers import PreTrainedModel

    found: dict[str, PreTrainedModel] = {}
    if main_input(model) != "input_ids":
        return found
    for path, part in model.named_modules():
        inside = any(path.startswith(f"{tower}.") for tower in found)
        if isinstance(part, PreTrainedModel) and not inside and _senses(part):
            found[path] = part
    return found


def _senses(part: PreTrainedModel) -> bool:
    known = in_patches(part) or not set(MAIN_INPUTS).isdisjoint(accepted(part.forward))
    return known and main_input(part) != "input_ids"


def tower_passes(model: PreTrainedModel, batch: int, length: int) -> Iterator[Pass]:
    """The passes that run what a pass on text leaves out.

    Each tower by itself; and what makes of its output that which the text model reads: a method of
    transformers' models, or the whole model, on `length` tokens beside the images. Of the passes of
    one name the first that runs is meant; one whose inputs are not known fails when it is run. What
    that method returns, `in_a_text` takes.
    """
    for path, tower in towers(model).items():
        try:
            shapes = _shapes(tower, batch, length)
            with torch.device(model.device):
                mains = [torch.zeros(shape, dtype=model.dtype) for shape in shapes]
            inputs = [plain_inputs(tower, main, torch.empty(0)) for main in mains]
            beside = [_beside(model, path, tower, main, length) for main in mains]
        except Exception as error:  # of no known size; a config may hold anything
            yield _pass(path, path, tower, partial(_fail, error), {}, alone=True)
            continue
        for given in inputs:
            yield _pass(path, path, tower, tower, given, alone=True)
        yield from (each for each in beside if each is not None)


def _shapes(tower: PreTrainedModel, batch: int, length: int) -> list[tuple[int, ...]]:
    """The shapes that the main input may have: code may read the pixels of a patch in a row."""
    shapes = [main_shape(tower, batch, length)]
    if in_patches(tower) and len(patch_shape(tower)) > 1:
        shapes.append((shapes[0][0], *patch_shape(tower)))
    return shapes


def _beside(
    model: PreTrainedModel, path: str, tower: PreTrainedModel, main: torch.Tensor, length: int
) -> Pass | None:
    """The pass that makes of `main`, which `tower` reads, what the text model reads."""
    kind = "audio" if main_input(tower) == "input_features" else "image"
    method = f"get_{kind}_features"
    owners = [
        (name, part)
        for name, part in model.named_modules()
        if path.startswith(f"{name}." if name else "") and hasattr(part, method)
    ]
    if owners:
        name, part = owners[-1]
        run = getattr(part, method)
        inputs = _features_inputs(part, run, tower, main)
        name = f"{name}.{method}" if name else method
        return _pass(name, path, part, run, inputs)
    if main_input(tower) not in accepted(model.forward):
        return None
    inputs = trace_inputs(model, len(main), length)
    inputs["input_ids"] = _tokens(model, len(main), length)
    inputs |= _features_inputs(model, model.forward, tower, main)
    return _pass("", path, model, model, inputs, "and tokens")


def _pass(
    name: str,
    tower: str,
    part: PreTrainedModel,
    run: Callable[..., Any],
    inputs: dict[str, Any],
    where: str = "",
    *,
    alone: bool = False,
) -> Pass:
    what = f"{_kind(inputs)} {where}".rstrip()
    return Pass(name=name, what=what, tower=tower, part=part, run=run, inputs=inputs, alone=alone)


def _fail(error: Exception, **_: Any) -> None:
    raise error


def _kind(inputs: dict[str, Any]) -> str:
    return "spectra" if "input_features" in inputs else "images"


def in_a_text(model: PreTrainedModel, made: Pass, features: Any) -> Pass | None:
    """The pass on a text with places for the `features` that the pass `made` has returned.

    None if that makes nothing for a text, or if the model's config does not say by what token such
    a place is known. If it is not known how many places there are, the pass fails when it is run.
    """
    names = ("image_token_id", "image_token_index")
    if _kind(made.inputs) == "spectra":
        names = ("audio_token_id", "audio_token_index")
    known = (getattr(model.config, name, None) for name in names)
    place = next((token for token in known if token is not None), None)
    if place is None or made.alone or not made.name:
        return None
    ids: list[int] = []
    try:
        for places in _places(features):
            ids += [*range(1, 1 + _BETWEEN), *[place] * places]
    except Exception as error:  # of a size that depends on data; code may return anything
        return _pass("", made.tower, model, partial(_fail, error), made.inputs, _IN_A_TEXT)
    with unset_fake_temporarily():  # the model's code must know the numbers
        tokens = torch.tensor([[*ids, *range(1, 1 + _BETWEEN)]])
        kinds = (tokens == place).to(torch.int64)
    taken = accepted(model.forward)
    more = {"use_cache": False, "mm_token_type_ids": kinds, "decoder_input_ids": kinds}
    more = {name: value for name, value in more.items() if name in taken}
    inputs = {"input_ids": tokens, **made.inputs, **more}
    return _pass("", made.tower, model, model, inputs, _IN_A_TEXT)


_IN_A_TEXT = "in a text"
_BETWEEN = 3
"""Tokens in front of each image in a text, and behind the last one."""


def _places(features: Any) -> list[int]:
    """How many places in a text each image or sound takes."""
    from transformers.utils import ModelOutput

    if isinstance(features, ModelOutput):
        features = next(
            features[name] for name in ("pooler_output", "last_hidden_state") if name in features
        )
    leaves = [leaf for leaf in tree_leaves(features) if isinstance(leaf, torch.Tensor)]
    if len(leaves) == 1 and leaves[0].ndim > 2:  # [images, places, features]
        leaves = [*leaves[0]]
    return [math.prod(leaf.shape[:-1]) for leaf in leaves]


def _features_inputs(
    part: PreTrainedModel, run: Callable[..., Any], tower: PreTrainedModel, main: torch.Tensor
) -> dict[str, Any]:
    """What `run` of `part` takes for `tower` to read `main`."""
    names = accepted(run)
    if main_input(tower) == "input_features":
        with unset_fake_temporarily():  # the model's code must know the numbers
            frames = torch.ones(len(main), main.shape[-1], dtype=torch.int64)
        masks = dict.fromkeys(_MASKS, frames)
        return {"input_features": main, **told(run, masks)}
    _, numbers = images(tower, len(main))
    if main.ndim == _WHOLE and not in_patches(tower):
        if "pixel_attention_mask" in names:  # the images of each sequence, of which zeros are none
            with unset_fake_temporarily():
                main = torch.ones(len(main), 1, *main.shape[1:], dtype=main.dtype)
        elif getattr(part.config, "image_grid_pinpoints", None):
            tiles = _fewest_tiles(part, main.shape[-1])
            main = main.unsqueeze(1).expand(-1, tiles, -1, -1, -1)
    name = "pixel_values" if "pixel_values" in names else names[0]
    return {name: main, **told(run, numbers)}


_MASKS = ("input_features_mask", "feature_attention_mask", "padding_mask")
_WHOLE = 4  # axes of images that are not cut


def _fewest_tiles(part: PreTrainedModel, side: int) -> int:
    """Into how many tiles an image of one tile's size is cut, and one of it all."""
    sizes = setting(part, "image_grid_pinpoints")
    return 1 + min(int(-(-height // side) * -(-width // side)) for height, width in sizes)


def _tokens(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    vocabulary: int = model.config.get_text_config().vocab_size
    with torch.device(model.device):
        return torch.arange(batch * length).remainder(vocabulary).reshape(batch, length)
