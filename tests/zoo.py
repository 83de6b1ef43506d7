"""Tiny random models, one per architecture that the tests must survive.

A fresh model is useless for testing a fold: its gains are 1 and its biases 0, so folding nothing
passes. `save` therefore draws every parameter at random, and the sizes below differ from one
another, so a gain applied along the wrong axis fails instead of fitting by chance.

To add an architecture, add an entry to `ZOO`, or to `zoo_layernorm.py`: its `model_type`, and what
`SIZES` does not cover. `test_zoo.py` then checks that it builds, survives the disk and feels each
of its gains.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from normconvert.precision import computing_in
from zoo_entry import PARTIAL_ROTARY, SIZES, Entry
from zoo_layernorm import LAYERNORM

__all__ = ["SIZES", "ZOO", "Entry", "build", "inputs", "load", "logits", "run", "save"]

_GRANITE: Mapping[str, Any] = {
    "embedding_multiplier": 3.1,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.45,
    "logits_scaling": 1.7,
}
_DEEPSEEK: Mapping[str, Any] = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 9,
    "n_routed_experts": 15,
    "n_group": 5,
    "topk_group": 3,
    "kv_lora_rank": 26,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 6,
    "v_head_dim": 11,
}

ZOO: Mapping[str, Entry] = {
    "llama": Entry(model_type="llama"),
    "llama_tied": Entry(model_type="llama", config={"tie_word_embeddings": True}),
    "mistral": Entry(model_type="mistral", config={"sliding_window": 4}),
    "qwen2": Entry(model_type="qwen2"),
    "qwen3": Entry(model_type="qwen3"),
    "gemma": Entry(model_type="gemma"),
    "gemma2": Entry(model_type="gemma2", config={"sliding_window": 4, "query_pre_attn_scalar": 12}),
    "gemma3_text": Entry(
        model_type="gemma3_text",
        config={
            "sliding_window": 4,
            "query_pre_attn_scalar": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma3n_text": Entry(
        model_type="gemma3n_text",
        config={
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
            "sliding_window": 4,
            "vocab_size_per_layer_input": 103,
            "hidden_size_per_layer_input": 13,
            "laurel_rank": 11,
            "altup_num_inputs": 4,
        },
    ),
    "phi3": Entry(model_type="phi3", config={"original_max_position_embeddings": 64}),
    "granite": Entry(model_type="granite", config=_GRANITE),
    "smollm3": Entry(model_type="smollm3", config={"no_rope_layer_interval": 3}),
    "olmo2": Entry(model_type="olmo2"),
    "glm4": Entry(model_type="glm4", config=PARTIAL_ROTARY),
    "mixtral": Entry(model_type="mixtral"),
    "qwen3_moe": Entry(
        model_type="qwen3_moe",
        config={"mlp_only_layers": [1], "head_dim": 10},
        undeclared=("head_dim",),
    ),
    "qwen2_moe": Entry(model_type="qwen2_moe", config={"shared_expert_intermediate_size": 46}),
    "qwen3_next": Entry(
        model_type="qwen3_next",
        config={
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "shared_expert_intermediate_size": 46,
            "linear_key_head_dim": 12,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 9,
        },
    ),
    "deepseek_v3": Entry(
        model_type="deepseek_v3",
        config={**_DEEPSEEK, "q_lora_rank": 38},
        mtp=True,
    ),
    "deepseek_v3_no_q_latent": Entry(
        model_type="deepseek_v3", config={**_DEEPSEEK, "q_lora_rank": None}
    ),
    "gpt_oss": Entry(model_type="gpt_oss", config={"sliding_window": 4}),
    "granitemoe": Entry(model_type="granitemoe", config=_GRANITE),
    "minimax": Entry(
        model_type="minimax",
        config={
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "block_size": 4,
            "linear_attn_alpha_factor": 1.3,
            "full_attn_beta_factor": 0.7,
            "mlp_alpha_factor": 1.1,
        },
    ),
    "zamba2": Entry(
        model_type="zamba2",
        config={
            # Three hybrid layers share two transformer blocks: the first block serves twice.
            "num_hidden_layers": 5,
            "layers_block_type": [
                "linear_attention",
                "hybrid",
                "hybrid",
                "linear_attention",
                "hybrid",
            ],
            "num_mem_blocks": 2,
            "num_key_value_heads": 9,
            "use_shared_attention_adapter": True,
            "adapter_rank": 11,
            "use_mem_rope": True,
            "mamba_d_state": 8,
            "n_mamba_heads": 9,
            "mamba_ngroups": 3,
            "chunk_size": 4,
        },
    ),
    **LAYERNORM,
}


# Classes whose effective gain is 1 + w.
ONE_PLUS_W = frozenset(
    {
        "GemmaRMSNorm",
        "Gemma2RMSNorm",
        "Gemma3RMSNorm",
        "NemotronLayerNorm1P",
        "Qwen3NextRMSNorm",
    }
)


def save(
    name: str,
    folder: Path,
    *,
    dtype: str = "float64",
    max_shard_size: str = "5GB",
    seed: int = 0,
) -> None:
    """Write the model called `name` to `folder`, every parameter drawn from `seed`."""
    entry = ZOO[name]
    generator = torch.Generator().manual_seed(seed)
    # Initialization draws from the global generator; all that it draws is overwritten here.
    with torch.random.fork_rng(devices=[]):
        model = build(entry)
    _randomise(model, generator)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    if entry.mtp:
        _append_mtp_layer(folder, model.config.num_hidden_layers, generator)


def load(folder: Path, *, dtype: str = "float64") -> PreTrainedModel:
    """The model in `folder`, ready for inference; raises if a tensor did not find its place."""
    config = AutoConfig.from_pretrained(folder)
    model: PreTrainedModel
    with computing_in(getattr(torch, dtype)):  # routers are made in float32, whatever is asked for
        model, info = getattr(transformers, config.architectures[0]).from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            output_loading_info=True,
        )
    unread = _mtp_prefix(config)
    info["unexpected_keys"] = {
        key for key in info["unexpected_keys"] if not (unread and key.startswith(unread))
    }
    if problems := {kind: keys for kind, keys in info.items() if keys}:
        raise ValueError(f"{folder} does not load cleanly: {problems}")
    if model._can_set_experts_implementation():
        # The default, a grouped product, has no float64 kernel.
        model.set_experts_implementation("eager")
    return model


def inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random inputs of the kinds and sizes that `model` takes, the same for every model."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, SIZES["vocab_size"], (batch, length), generator=generator)
    config = model.config
    found: dict[str, torch.Tensor]
    match model.main_input_name:
        case "pixel_values":
            size = config.image_size
            images = _normal(torch.Size([batch, config.num_channels, size, size]), generator)
            found = {"pixel_values": images.to(model.dtype)}
        case "input_features":  # the encoder's second convolution halves the frames
            frames = 2 * config.max_source_positions
            spectra = _normal(torch.Size([batch, config.num_mel_bins, frames]), generator)
            found = {"input_features": spectra.to(model.dtype)}
        case _:
            found = {"input_ids": ids}
    if config.is_encoder_decoder:
        found["decoder_input_ids"] = ids.flip(0, 1)
    return found


@torch.no_grad()
def run(model: PreTrainedModel, given: torch.Tensor | Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The logits of `model` on token ids or on its `inputs`.

    Without a head, its last hidden states and what it pools from them, a row for every sequence.
    """
    named = {"input_ids": given} if isinstance(given, torch.Tensor) else given
    generates = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None) is not None
    with _default_dtype(model.dtype):
        output = model(**named, **({"use_cache": False} if generates else {}))
    found: torch.Tensor
    if "logits" in output:
        found = output.logits
    else:
        found = torch.cat([output.last_hidden_state.flatten(1), output.pooler_output], dim=1)
    return found.to(model.dtype)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """float64 by default for a model in it: XGLM makes a mask of its lowest number by default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype if dtype is torch.float64 else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def logits(folder: Path, input_ids: torch.Tensor, dtype: str = "float64") -> torch.Tensor:
    """What the model in `folder` computes, as transformers computes it."""
    return run(load(folder, dtype=dtype), input_ids)


def build(entry: Entry) -> PreTrainedModel:
    """The model as its class initializes it: neutral gains, zero biases."""
    config = make_config(entry)
    model_class: Any = (
        getattr(transformers, entry.architecture)
        if entry.architecture
        else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    )
    model: PreTrainedModel = model_class(config)
    return model


def make_config(entry: Entry) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[entry.model_type]
    # transformers swallows a key that it does not know: the size stays at its full-scale default,
    # or the feature stays untested.
    if unknown := undeclared(config_class, entry.config) - set(entry.undeclared):
        raise ValueError(f"{config_class.__name__} has no {sorted(unknown)}")
    declared = _fields(config_class)
    shared = {key: size for key, size in SIZES.items() if key in declared}
    return config_class(**{**shared, **entry.config})


def undeclared(config_class: type[PreTrainedConfig], config: Mapping[str, Any]) -> set[str]:
    """The keys of `config` that are no field of the class, nested ones as "parent.key"."""
    unknown = set(config) - _fields(config_class)
    for parent, nested_class in config_class.sub_configs.items():
        given = config.get(parent, {})
        if nested_class is AutoConfig:
            nested_class = CONFIG_MAPPING[given["model_type"]]
            given = {key: value for key, value in given.items() if key != "model_type"}
        nested = undeclared(nested_class, given)
        unknown |= {f"{parent}.{key}" for key in nested}
    return unknown


def is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def identity_gain(module: nn.Module) -> float:
    """The stored gain with which the norm `module` only normalizes."""
    return 0.0 if type(module).__name__ in ONE_PLUS_W else 1.0


def _fields(config_class: type[PreTrainedConfig]) -> set[str]:
    return {declared.name for declared in dataclasses.fields(config_class)}


@torch.no_grad()
def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    # In float64, so that a seed means the same model in every dtype, rounded.
    model.double()  # complex buffers stay so
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        parameter.copy_(_draw(model.get_submodule(path), leaf, parameter.shape, generator))
    for name, buffer in model.named_buffers():
        # The other buffers are tables, computed from the config.
        if name.endswith(("e_score_correction_bias", "final_logits_bias")):
            buffer.copy_(0.3 * _normal(buffer.shape, generator))


def _draw(
    module: nn.Module, leaf: str, shape: torch.Size, generator: torch.Generator
) -> torch.Tensor:
    if is_norm(module) and leaf == "weight":
        return _effective_gain(shape, generator) - (1.0 - identity_gain(module))
    if "layerscale" in type(module).__name__.lower():
        return _effective_gain(shape, generator)
    if isinstance(module, nn.Embedding):
        # Off centre: centering an embedding must not pass by doing nothing.
        return 0.2 + 0.5 * _normal(shape, generator)
    if len(shape) > 1:
        # Between 1/sqrt(in) and 1/sqrt(out), so it does not matter which axis is which.
        scale: float = max(1, shape[-1] * shape[-2]) ** -0.25
        return scale * _normal(shape, generator)
    return 0.3 * _normal(shape, generator)


def _effective_gain(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Gains spread over 0.5 to 1.8, about one in eight of them negative."""
    size = 0.5 + 1.3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    negative = torch.rand(shape, generator=generator, dtype=torch.float64) < 1 / 8
    return torch.where(negative, -size, size)


def _normal(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _mtp_prefix(config: PreTrainedConfig) -> str:
    """Prefix of the multi-token-prediction tensors, empty if the type stores none."""
    if any(entry.mtp and entry.model_type == config.model_type for entry in ZOO.values()):
        return f"model.layers.{config.num_hidden_layers}."
    return ""


def _append_mtp_layer(folder: Path, index: int, generator: torch.Generator) -> None:
    """Add layer `index` to the last shard, and to the weight map if there is one."""
    shards = sorted(folder.glob("*.safetensors"))
    stored = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    extra = _mtp_tensors(stored, index, generator)
    save_file({**load_file(shards[-1]), **extra}, shards[-1], metadata={"format": "pt"})
    index_file = folder / "model.safetensors.index.json"
    if index_file.exists():
        content = json.loads(index_file.read_text())
        content["weight_map"] |= dict.fromkeys(extra, shards[-1].name)
        content["metadata"]["total_size"] += sum(tensor.nbytes for tensor in extra.values())
        index_file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _mtp_tensors(
    stored: Mapping[str, torch.Tensor], index: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """The layer as DeepSeek stores it: a decoder layer, a projection, an embedding and a head."""
    embedding = stored["model.embed_tokens.weight"]
    hidden_size = embedding.shape[1]
    template = f"model.layers.{index - 1}."
    shapes = {
        name.removeprefix(template): tensor.shape
        for name, tensor in sorted(stored.items())
        if name.startswith(template)
    }
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        shapes[f"{norm}.weight"] = torch.Size([hidden_size])
    shapes["eh_proj.weight"] = torch.Size([hidden_size, 2 * hidden_size])
    layer = {leaf: _normal(shape, generator) for leaf, shape in shapes.items()}
    # Embedding and head are the model's own, stored twice.
    layer["embed_tokens.weight"] = embedding.clone()
    layer["shared_head.head.weight"] = stored["lm_head.weight"].clone()
    return {f"model.layers.{index}.{k}": v.to(embedding.dtype) for k, v in layer.items()}
