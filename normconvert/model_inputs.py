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
from normconvert.images import GRIDS, accepted, images, setting, told

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAIN_INPUTS = ("input_ids", "input_features", "pixel_values")
"""Text first: a model that reads both text and images runs on text alone."""


def main_input(model: PreTrainedModel) -> str:
    """The name of the input that `model` cannot do without: one of `MAIN_INPUTS`, or patches.

    Raises:
        TraceError: it takes none of them.
    """
    names = accepted(model.forward)
    if in_patches(model):
        return names[0]
    for name in MAIN_INPUTS:
        if name in names:
            return name
    raise TraceError(
        f"{type(model).__name__} reads no {', '.join(MAIN_INPUTS[:-1])} or {MAIN_INPUTS[-1]}; "
        "only models of text, images or mel spectra are traced."
    )


def reads_ids(model: PreTrainedModel) -> bool:
    """Whether token ids are among the inputs: of the model, or of its decoder."""
    return main_input(model) == "input_ids" or "decoder_input_ids" in accepted(model.forward)


def in_patches(model: PreTrainedModel) -> bool:
    """Whether `model` reads images of any size, cut into patches, and no text."""
    names = accepted(model.forward)
    return not GRIDS.isdisjoint(names) and "input_ids" not in names


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
    match main_input(model):
        case "input_ids":
            return batch, length
        case "input_features":
            # Convolutions shorten the spectrum to the positions that the encoder has.
            convolutions = (m for m in model.modules() if isinstance(m, torch.nn.Conv1d))
            frames_per_position = math.prod(module.stride[0] for module in convolutions)
            frames = setting(model, "max_source_positions") * frames_per_position
            return batch, setting(model, "num_mel_bins"), frames
        case _:
            shape, _ = images(model, batch)
            return shape


def plain_inputs(model: PreTrainedModel, main: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
    """The inputs that the model needs: the main one and, if it has a decoder, ids for that.

    Without a cache, which nobody reads afterwards.
    """
    name = main_input(model)
    inputs: dict[str, Any] = {name: main}
    if "decoder_input_ids" in accepted(model.forward):
        inputs["decoder_input_ids"] = ids
    if "use_cache" in accepted(model.forward):
        inputs["use_cache"] = False
    if name not in ("input_ids", "input_features"):
        _, numbers = images(model, len(main))
        inputs |= told(model.forward, numbers)
    return inputs


def optional_inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, Any]:
    """Zeros for the inputs that a model of this class may take as well, but not every one does.

    The states of an encoder, [batch, length, hidden size], where the model is a decoder alone; the
    patches, [batch, patches], that a mask token stands in for.
    """
    names = accepted(model.forward)
    found: dict[str, Any] = {}
    if set(MAIN_INPUTS).isdisjoint(names):
        return found
    size = getattr(model.config.get_text_config(), "hidden_size", None)
    if size and main_input(model) == "input_ids" and "decoder_input_ids" not in names:
        states = torch.zeros(batch, length, size, dtype=model.dtype)
        known = {"encoder_hidden_states": states, "encoder_outputs": (states,)}
        found |= {name: given for name, given in known.items() if name in names}
    if "bool_masked_pos" in names and main_input(model) == "pixel_values":
        *_, height, width = main_shape(model, batch, length)
        patch = setting(model, "patch_size")
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

    Without a `cache` that is the whole text of `length` tokens, then one more token. `states` is
    what its encoder returned, if there is one and that is known.
    """
    count = 1 if cache else length
    inputs = trace_inputs(model, 1, count)
    names = accepted(model.forward)
    if "use_cache" in names:
        inputs["use_cache"] = True
    if "attention_mask" in names and main_input(model) == "input_ids":
        alone = bool(cache) and "decoder_input_ids" not in names
        with unset_fake_temporarily():  # the model's code must know the numbers
            inputs["attention_mask"] = torch.ones(1, length + alone, dtype=torch.int64)
    if cache and "position_ids" in inputs:
        inputs["position_ids"] = inputs["position_ids"] + length
    if cache and states is not None and "encoder_outputs" in names:
        inputs["encoder_outputs"] = states
    return {**inputs, **cache}


def handed_back(model: PreTrainedModel, output: Any) -> dict[str, Any]:
    """What `model` gave back in `output` that it takes as well: its cache, by whatever name."""
    names = accepted(model.forward)
    if not reads_ids(model):
        return {}
    if isinstance(output, Mapping):
        return {name: output[name] for name in names if output.get(name) is not None}
    cache = next((each for each in tree_leaves(output) if isinstance(each, Cache)), None)
    return {"past_key_values": cache} if cache and "past_key_values" in names else {}


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
    if text and "position_ids" in accepted(model.forward):
        inputs["position_ids"] = torch.arange(length).unsqueeze(0).expand(batch, length)
    return inputs
