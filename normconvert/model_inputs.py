"""What one forward pass of a model takes, read off its signature, its config and its modules."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves
from transformers import Cache

from normconvert.errors import TraceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAIN_INPUTS = ("input_ids", "input_features", "pixel_values")
"""Text first: a model that reads both text and images runs on text alone."""

GRID = "grid_thw"
"""Beside it a vision tower reads images of any size, cut into patches: [patches, pixels]."""


def main_input(model: PreTrainedModel) -> str:
    """The name of the input that `model` cannot do without: one of `MAIN_INPUTS`, or patches.

    Raises:
        TraceError: it takes none of them.
    """
    accepted = _accepted(model)
    if _in_patches(model):
        return accepted[0]
    for name in MAIN_INPUTS:
        if name in accepted:
            return name
    raise TraceError(
        f"{type(model).__name__} reads no {', '.join(MAIN_INPUTS[:-1])} or {MAIN_INPUTS[-1]}; "
        "only models of text, images or mel spectra are traced."
    )


def reads_ids(model: PreTrainedModel) -> bool:
    """Whether token ids are among the inputs: of the model, or of its decoder."""
    return main_input(model) == "input_ids" or "decoder_input_ids" in _accepted(model)


def towers(model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """The parts of a model of text that read images or spectra instead, by their paths.

    One forward pass on text runs none of them.
    """
    from transformers import PreTrainedModel

    found: dict[str, PreTrainedModel] = {}
    if main_input(model) != "input_ids" or "decoder_input_ids" in _accepted(model):
        return found
    for path, part in model.named_modules():
        inside = any(path.startswith(f"{tower}.") for tower in found)
        if isinstance(part, PreTrainedModel) and not inside and _senses(part):
            found[path] = part
    return found


def _senses(part: PreTrainedModel) -> bool:
    known = _in_patches(part) or not set(MAIN_INPUTS).isdisjoint(_accepted(part))
    return known and main_input(part) != "input_ids"


def _in_patches(model: PreTrainedModel) -> bool:
    accepted = _accepted(model)
    return GRID in accepted and "input_ids" not in accepted


def _grid(model: PreTrainedModel) -> list[list[int]]:
    """How many patches two images have each: in time, height and width."""
    merge = getattr(model.config, "spatial_merge_size", 1)
    return [[1, 3 * merge, 5 * merge], [1, 2 * merge, merge]]  # 17 merged, which no size is


def longest(model: PreTrainedModel) -> int:
    """How many tokens the model reads at once, by its config; 0 where that does not say."""
    config = model.config.get_text_config()
    lengths = [getattr(config, name, None) or 0 for name in _LONGEST]
    found = [length for length in lengths if length > 0]
    # In RoBERTa's table of positions the first ones are for padding.
    found += [
        each.num_embeddings - each.padding_idx - 1
        for each in model.modules()
        if isinstance(each, torch.nn.Embedding)
        and each.padding_idx is not None
        and each.num_embeddings in found
    ]
    return min(found, default=0)


_LONGEST = ("max_position_embeddings", "max_target_positions", "max_seq_len")


def main_shape(model: PreTrainedModel, batch: int, length: int) -> tuple[int, ...]:
    """The shape of the main input: `length` tokens, or the one image or spectrum size that fits.

    Raises:
        TraceError: the model's config does not say which size that is.
    """
    if _in_patches(model):
        weight = next(m.weight for m in model.modules() if isinstance(m, _FIRST))
        return sum(math.prod(sizes) for sizes in _grid(model)), weight[0].numel()
    match main_input(model):
        case "pixel_values":
            size = _setting(model, "image_size")
            height, width = size if isinstance(size, (list, tuple)) else (size, size)
            return batch, _setting(model, "num_channels"), height, width
        case "input_features":
            # Convolutions shorten the spectrum to the positions that the encoder has.
            convolutions = (m for m in model.modules() if isinstance(m, torch.nn.Conv1d))
            frames_per_position = math.prod(module.stride[0] for module in convolutions)
            frames = _setting(model, "max_source_positions") * frames_per_position
            return batch, _setting(model, "num_mel_bins"), frames
        case _:
            return batch, length


_FIRST = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)


def plain_inputs(model: PreTrainedModel, main: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
    """The inputs that the model needs: the main one and, if it has a decoder, ids for that.

    Without a cache, which nobody reads afterwards.
    """
    inputs: dict[str, Any] = {main_input(model): main}
    if "decoder_input_ids" in _accepted(model):
        inputs["decoder_input_ids"] = ids
    if "use_cache" in _accepted(model):
        inputs["use_cache"] = False
    if _in_patches(model):
        with unset_fake_temporarily():  # the model's code must know the numbers
            inputs[GRID] = torch.tensor(_grid(model))
    return inputs


def optional_inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, Any]:
    """Zeros for the inputs that a model of this class may take as well, but not every one does.

    The states of an encoder, [batch, length, hidden size], where the model is a decoder alone; the
    patches, [batch, patches], that a mask token stands in for.
    """
    accepted = _accepted(model)
    found: dict[str, Any] = {}
    if set(MAIN_INPUTS).isdisjoint(accepted):
        return found
    size = getattr(model.config.get_text_config(), "hidden_size", None)
    if size and main_input(model) == "input_ids" and "decoder_input_ids" not in accepted:
        states = torch.zeros(batch, length, size, dtype=model.dtype)
        known = {"encoder_hidden_states": states, "encoder_outputs": (states,)}
        found |= {name: given for name, given in known.items() if name in accepted}
    if "bool_masked_pos" in accepted and main_input(model) == "pixel_values":
        *_, height, width = main_shape(model, batch, length)
        patch = _setting(model, "patch_size")
        patches = (height // patch) * (width // patch)
        found["bool_masked_pos"] = torch.zeros(batch, patches, dtype=torch.bool)
    return found


def inputs_in_use(
    model: PreTrainedModel,
    length: int,
    cache: Mapping[str, Any] = MappingProxyType({}),
    states: Any = None,
) -> dict[str, Any]:
    """What one text is read with in use: a mask, and a cache that takes up what is read.

    Without a `cache` that is the whole text of `length` tokens, then one more token. `states` are
    those of the encoder, if there is one and they are known.
    """
    count = 1 if cache else length
    inputs = trace_inputs(model, 1, count)
    accepted = _accepted(model)
    if "use_cache" in accepted:
        inputs["use_cache"] = True
    if "attention_mask" in accepted and main_input(model) == "input_ids":
        alone = bool(cache) and "decoder_input_ids" not in accepted
        with unset_fake_temporarily():  # the model's code must know the numbers
            inputs["attention_mask"] = torch.ones(1, length + alone, dtype=torch.int64)
    if cache and "position_ids" in inputs:
        inputs["position_ids"] = inputs["position_ids"] + length
    if cache and states is not None and "encoder_outputs" in accepted:
        inputs["encoder_outputs"] = (states,)
    return {**inputs, **cache}


def handed_back(model: PreTrainedModel, output: Any) -> dict[str, Any]:
    """What `model` gave back in `output` that it takes as well: its cache, by whatever name."""
    accepted = _accepted(model)
    if not reads_ids(model):
        return {}
    if isinstance(output, Mapping):
        return {name: output[name] for name in accepted if output.get(name) is not None}
    cache = next((each for each in tree_leaves(output) if isinstance(each, Cache)), None)
    return {"past_key_values": cache} if cache and "past_key_values" in accepted else {}


def all_wanted(model: PreTrainedModel, logits: tuple[int | str, ...]) -> dict[str, Any]:
    """Labels, zeros, for one of the `logits`, and flags for all that a model can return besides."""
    parameters = inspect.signature(model.forward).parameters
    any_name = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    found: dict[str, Any] = {
        name: True
        for name in ("output_attentions", "output_hidden_states")
        if any_name or name in parameters
    }
    sizes = [size for size in logits[1:-1] if isinstance(size, int)]
    if "labels" in parameters and len(sizes) == len(logits) - 2:
        found["labels"] = torch.zeros(1, *sizes, dtype=torch.int64)
    return found


def trace_inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, Any]:
    """Zeros as inputs, and what else keeps a model from looking at them: positions, no cache.

    Raises:
        TraceError: the model takes an input that is not known here.
    """
    ids = torch.zeros(batch, length, dtype=torch.int64)
    text = main_input(model) == "input_ids"
    main = ids if text else torch.zeros(main_shape(model, batch, length))
    inputs = plain_inputs(model, main, ids)
    if text and "position_ids" in _accepted(model):
        inputs["position_ids"] = torch.arange(length).unsqueeze(0).expand(batch, length)
    return inputs


def _accepted(model: PreTrainedModel) -> tuple[str, ...]:
    return tuple(inspect.signature(model.forward).parameters)


def _setting(model: PreTrainedModel, name: str) -> Any:
    """The value of `name` in the model's config, or in that of one of its parts."""
    config = model.config
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        if getattr(part, name, None) is not None:
            return getattr(part, name)
    raise TraceError(
        f"{type(model).__name__} reads {main_input(model)}, but its config has no {name}: what "
        "size they have is not known."
    )
