"""Tiny random models, one per architecture that the tests must survive.

A fresh model is useless for testing a fold: its gains are 1 and its biases 0, so folding nothing
passes. `save` therefore draws every parameter at random, and the sizes below differ from one
another, so a gain applied along the wrong axis fails instead of fitting by chance.

To add an architecture, add an entry to `ZOO`: its `model_type`, and what `SIZES` does not cover.
`test_zoo.py` then checks that it builds, survives the disk and feels each of its gains.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What makes one tiny model. Sizes not given come from `SIZES`."""

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    # Class name, where it is not the type's causal language model.
    architecture: str = ""
    # Keys that the config class does not declare, though the model reads them.
    undeclared: tuple[str, ...] = ()
    # Add a multi-token-prediction layer to the files, which the model class does not read.
    mtp: bool = False


# Given to every config class that has a field of that name. No size is 2, 7 or 14, which are the
# batch, the sequence and their product in a trace. That holds for derived sizes too: 3 experts per
# token, 3 query heads per key-value head, 5 rotary frequencies per head.
SIZES: Mapping[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 54,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "num_local_experts": 5,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 34,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
}

_PARTIAL_ROTARY: Mapping[str, Any] = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.6,
    },
}
# For classes that derive the head size: wide enough to rotate 6 of a head's 10 coordinates.
_PARTIAL_ROTARY_WIDE: Mapping[str, Any] = {**_PARTIAL_ROTARY, "hidden_size": 90}
_GPT2_SIZES: Mapping[str, Any] = {"n_embd": 54, "n_inner": 88, "n_head": 9, "n_layer": 3}
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
    "olmo": Entry(model_type="olmo"),
    "olmo2": Entry(model_type="olmo2"),
    "glm4": Entry(model_type="glm4", config=_PARTIAL_ROTARY),
    "cohere": Entry(model_type="cohere"),
    "cohere_qk_norm": Entry(model_type="cohere", config={"use_qk_norm": True}),
    "stablelm": Entry(model_type="stablelm", config={**_PARTIAL_ROTARY_WIDE, "use_qkv_bias": True}),
    "stablelm_parallel": Entry(
        model_type="stablelm",
        config={**_PARTIAL_ROTARY_WIDE, "use_parallel_residual": True, "qk_layernorm": True},
    ),
    "starcoder2": Entry(model_type="starcoder2"),
    "gpt_neox": Entry(model_type="gpt_neox", config=_PARTIAL_ROTARY_WIDE),
    "gpt_neox_sequential": Entry(
        model_type="gpt_neox", config={**_PARTIAL_ROTARY_WIDE, "use_parallel_residual": False}
    ),
    "gpt2": Entry(model_type="gpt2", config={**_GPT2_SIZES, "n_positions": 64}),
    "gptj": Entry(
        model_type="gptj",
        config={**_GPT2_SIZES, "n_embd": 90, "rotary_dim": 6, "n_positions": 64},
    ),
    # CodeGen splits its fused projection into four blocks, so its heads must divide by 4.
    "codegen": Entry(
        model_type="codegen",
        config={
            **_GPT2_SIZES,
            "n_embd": 60,
            "n_head": 4,
            "rotary_dim": 6,
            "n_positions": 64,
            "n_ctx": 64,
        },
    ),
    "opt": Entry(model_type="opt", config={"ffn_dim": 88, "word_embed_proj_dim": 54}),
    "phi": Entry(model_type="phi", config=_PARTIAL_ROTARY_WIDE),
    "bloom": Entry(model_type="bloom", config={"n_head": 9, "n_layer": 3}),
    "falcon": Entry(model_type="falcon", config={"ffn_hidden_size": 88, "bias": True}),
    "falcon_new": Entry(
        model_type="falcon",
        config={"ffn_hidden_size": 88, "num_kv_heads": 3, "new_decoder_architecture": True},
    ),
    "nemotron": Entry(model_type="nemotron", config=_PARTIAL_ROTARY),
    "bert": Entry(model_type="bert", config={"type_vocab_size": 5}, architecture="BertForMaskedLM"),
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
    # Its router picks two experts whatever the config says.
    "phimoe": Entry(
        model_type="phimoe",
        config={"num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True},
    ),
    "dbrx": Entry(
        model_type="dbrx",
        config={
            "d_model": 54,
            "n_heads": 9,
            "n_layers": 3,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 3, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 88, "moe_num_experts": 5, "moe_top_k": 3},
        },
        undeclared=("attn_config.rope_theta",),
    ),
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


@torch.no_grad()
def run(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return output.to(model.dtype)


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
        nested = undeclared(nested_class, config.get(parent, {}))
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
    model.to(torch.float64)
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        parameter.copy_(_draw(model.get_submodule(path), leaf, parameter.shape, generator))
    for name, buffer in model.named_buffers():
        # The other buffers are tables, computed from the config.
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * _normal(buffer.shape, generator))


def _draw(
    module: nn.Module, leaf: str, shape: torch.Size, generator: torch.Generator
) -> torch.Tensor:
    if is_norm(module) and leaf == "weight":
        return _effective_gain(shape, generator) - (1.0 - identity_gain(module))
    if isinstance(module, nn.Embedding):
        # Off centre: centering an embedding must not pass by doing nothing.
        return 0.2 + 0.5 * _normal(shape, generator)
    if len(shape) > 1:
        # Between 1/sqrt(in) and 1/sqrt(out), so it does not matter which axis is which.
        scale: float = (shape[-1] * shape[-2]) ** -0.25
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
