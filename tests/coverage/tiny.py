"""Every causal type of transformers as a tiny model: its own default configuration, shrunk.

Sizes are given by the name of their field, to nested configurations as well. What a type needs
besides stands in `OVERRIDES`, or in the zoo, which has hand-made entries for many of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import zoo
from normconvert.models import openelm
from zoo_entry import SIZES

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# Beyond causal models: the class, whose own configuration is shrunk as well.
CLASSES = (
    "T5ForConditionalGeneration", "MT5ForConditionalGeneration", "UMT5ForConditionalGeneration",
    "LongT5ForConditionalGeneration", "SwitchTransformersForConditionalGeneration",
    "PegasusForConditionalGeneration", "BlenderbotForConditionalGeneration",
    "MBartForConditionalGeneration", "BartForConditionalGeneration",
    "WhisperForConditionalGeneration",
    "ViTModel", "ViTForImageClassification", "DeiTModel", "DeiTForImageClassification",
    "Dinov2Model", "Dinov2ForImageClassification", "DINOv3ViTModel",
    "SiglipVisionModel", "SiglipTextModel", "CLIPTextModel", "CLIPVisionModel",
    "CLIPTextModelWithProjection", "CLIPVisionModelWithProjection",
    "ModernBertModel", "ModernBertForMaskedLM", "EuroBertModel", "EuroBertForMaskedLM",
    "BertModel", "BertForMaskedLM", "RobertaForMaskedLM",
    "LlamaModel", "LlamaForSequenceClassification", "LlamaForTokenClassification",
    "Qwen2ForSequenceClassification", "Qwen3ForTokenClassification",
    "GPT2ForSequenceClassification", "GPTNeoXForTokenClassification",
    "LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration", "PaliGemmaForConditionalGeneration",
    "Gemma3ForConditionalGeneration", "Qwen3VLForConditionalGeneration",
    "Glm4vForConditionalGeneration", "Idefics3ForConditionalGeneration",
    "InternVLForConditionalGeneration", "Mistral3ForConditionalGeneration",
    "LlavaNextForConditionalGeneration", "AyaVisionForConditionalGeneration",
    "MllamaForConditionalGeneration", "MiniMaxM3SparseForConditionalGeneration",
    "Lfm2VlForConditionalGeneration", "VideoLlama3ForConditionalGeneration",
    "Kimi_K25ForConditionalGeneration", "MiniCPMV4_6ForConditionalGeneration",
    "Gemma4ForConditionalGeneration", "Idefics2ForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration", "AriaForConditionalGeneration",
    "Ovis2ForConditionalGeneration", "Llama4ForConditionalGeneration",
    "T5Gemma2ForConditionalGeneration", "OpenELMForCausalLM", "CLIPModel", "SiglipModel",
)  # fmt: skip

# Other forms of types, as the zoo has them: tied and untied, block layouts, with and without parts.
VARIANTS = tuple(name for name in zoo.ZOO if name not in TYPES)

NAMES = (*TYPES, *VARIANTS, *CLASSES)

# More names of sizes. No size is 2, 7 or 14: see `zoo_entry.SIZES`.
MORE_SIZES: Mapping[str, Any] = {
    **SIZES,
    "n_embd": 54, "n_head": 9, "n_layer": 3, "n_inner": 88, "n_positions": 64,
    "d_model": 54, "num_heads": 9, "num_layers": 3, "n_layers": 3, "n_heads": 9,
    "decoder_layers": 3, "encoder_layers": 3, "decoder_ffn_dim": 88, "encoder_ffn_dim": 88,
    "decoder_attention_heads": 9, "encoder_attention_heads": 9, "ffn_dim": 88,
    "attention_hidden_size": 54, "state_size": 8,
    "kv_lora_rank": 22, "q_lora_rank": 38, "qk_rope_head_dim": 6, "qk_nope_head_dim": 10,
    "v_head_dim": 12, "index_n_heads": 3, "index_head_dim": 16, "index_topk": 4,
    "n_routed_experts": 5, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "moe_layer_start_index": 1, "shared_expert_intermediate_size": 46,
    "linear_num_key_heads": 3, "linear_num_value_heads": 9,
    "linear_key_head_dim": 12, "linear_value_head_dim": 16,
    "sliding_window": 4, "chunk_size": 4,
    "d_ff": 88, "dff": 88, "dim_ff": 88, "num_decoder_layers": 3, "depth": 3,
    "vocab_size_per_layer_input": 101, "hidden_size_per_layer_input": 13,
    "shape_vocab_size": 97, "shape_embed_dim": 17, "pronunciation_vocab_size": 95,
    "pronunciation_embed_dim": 19, "linear_head_dim": 16, "swa_head_dim": 10, "rel_extent": 16,
    "ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 12,
    "moe_shared_expert_intermediate_size": 46, "shared_experts_intermediate_size": 46,
    "nemo_conv_channels": 11, "ext_pw_out_channel": 54, "depthwise_separable_out_channel": 54,
    "num_blocks": 3, "d_kv": 10,
    "indexer_n_heads": 3, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 6,
    "indexer_compress_ratio": 3, "unpadded_vocab_size": 97,
    "image_token_id": 100, "image_token_index": 100, "audio_token_id": 99, "video_token_id": 98,
}  # fmt: skip

_LATENT: Mapping[str, Any] = {"num_key_value_heads": 9}  # every head has its own keys
_MROPE: Mapping[str, Any] = {
    "text_config": {
        "vocab_size": 101, "hidden_size": 54, "intermediate_size": 88, "num_hidden_layers": 3,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]},
    }
}  # fmt: skip
_SIGLIP: Mapping[str, Any] = {  # four patches a side, which are merged two by two
    "vision_config": {
        "hidden_size": 54, "num_hidden_layers": 3, "num_attention_heads": 9,
        "intermediate_size": 88, "image_size": 12, "patch_size": 3,
    }
}  # fmt: skip
_ONE_CODEBOOK: Mapping[str, Any] = {
    "decoder": {
        "num_codebooks": 1, "vocab_size": 101, "hidden_size": 54, "ffn_dim": 88,
        "num_attention_heads": 9, "num_hidden_layers": 3, "max_position_embeddings": 64,
    }
}  # fmt: skip
_MAMBA: Mapping[str, Any] = {"mamba_n_heads": 9, "mamba_d_head": 12, "mamba_d_state": 8}

# A dot is between a part's configuration and what is set in that.
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32",
         "glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "minicpm3", "sarvam_mla", "youtu"),
        _LATENT,
    ),
    "OpenELMForCausalLM": {
        "model_dim": 54, "num_transformer_layers": 3, "num_query_heads": [3, 6, 9],
        "num_kv_heads": [1, 3, 3], "ffn_multipliers": [0.5, 1.3, 2.1], "ffn_dim_divisor": 8},
    "Qwen2VLForConditionalGeneration": {
        **_MROPE, "vision_config": {"depth": 3, "num_heads": 9, "hidden_size": 54,
                                    "embed_dim": 72, "mlp_ratio": 2}},
    "Qwen2_5_VLForConditionalGeneration": {
        **_MROPE, "vision_config": {"depth": 3, "num_heads": 9, "hidden_size": 72,
                                    "intermediate_size": 88, "out_hidden_size": 54}},
    "Qwen3VLForConditionalGeneration": {
        **_MROPE, "vision_config": {"depth": 3, "num_heads": 9, "hidden_size": 72,
                                    "intermediate_size": 88, "out_hidden_size": 54,
                                    "num_position_embeddings": 64,
                                    "deepstack_visual_indexes": [0, 1]}},
    "Glm4vForConditionalGeneration": {
        "text_config": {
            **_MROPE["text_config"], "hidden_size": 72, "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 3, "num_heads": 9, "hidden_size": 72, "intermediate_size": 88,
                          "out_hidden_size": 72, "image_size": 28}},
    "InternVLForConditionalGeneration": {
        "vision_config": {"hidden_size": 54, "num_hidden_layers": 3, "num_attention_heads": 9,
                          "intermediate_size": 88, "image_size": [12, 12], "patch_size": [3, 3]}},
    "AyaVisionForConditionalGeneration": _SIGLIP,
    "Idefics3ForConditionalGeneration": _SIGLIP,
    "gemma3": {"mm_tokens_per_image": 25},
    "Gemma3ForConditionalGeneration": {"mm_tokens_per_image": 25},
    "T5Gemma2ForConditionalGeneration": {"encoder.mm_tokens_per_image": 25},
    "PaliGemmaForConditionalGeneration": {"projection_dim": 54},
    "LlavaNextForConditionalGeneration": {"image_grid_pinpoints": [[15, 30], [30, 15], [30, 30]]},
    "MllamaForConditionalGeneration": {
        "text_config": {
            "vocab_size": 101, "hidden_size": 54, "intermediate_size": 88, "num_hidden_layers": 3,
            "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 64,
            "cross_attention_layers": [1], "pad_token_id": 0},
        "vision_config": {
            "hidden_size": 54, "intermediate_size": 88, "num_hidden_layers": 3,
            "num_global_layers": 1, "attention_heads": 9, "image_size": 15, "patch_size": 5,
            "max_num_tiles": 3, "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [2, 1], [3, 1]],
            "intermediate_layers_indices": [0, 1], "vision_output_dim": 162}},
    "Lfm2VlForConditionalGeneration": {"vision_config.num_patches": 25},
    "VideoLlama3ForConditionalGeneration": {"vision_config.hidden_size": 72},
    "Kimi_K25ForConditionalGeneration": {
        "text_config.num_key_value_heads": 9, "vision_config.hidden_size": 72,
        "projection_hidden_size": 72},
    "MiniCPMV4_6ForConditionalGeneration": {
        "vision_config.image_size": 12, "insert_layer_id": 1},
    "Gemma4ForConditionalGeneration": {
        "vision_config": {"model_type": "gemma4_vision", "hidden_size": 72, "head_dim": 8,
                          "intermediate_size": 88, "num_hidden_layers": 3,
                          "num_attention_heads": 9, "num_key_value_heads": 9, "patch_size": 3,
                          "position_embedding_size": 64}},
    "Idefics2ForConditionalGeneration": {
        "perceiver_config": {"hidden_size": 54, "resampler_n_latents": 4, "resampler_depth": 1,
                             "resampler_n_heads": 9, "resampler_head_dim": 6,
                             "num_key_value_heads": 3}},
    "LlavaOnevisionForConditionalGeneration": {
        "image_grid_pinpoints": [[15, 30], [30, 15], [30, 30]]},
    "AriaForConditionalGeneration": {"projector_patch_to_query_dict": {25: 4}},
    "Ovis2ForConditionalGeneration": {
        "vision_config.image_size": 12, "vision_config.hidden_stride": 2},
    "Llama4ForConditionalGeneration": {
        "vision_config.image_size": 12, "vision_config.hidden_size": 72,
        "vision_config.intermediate_size": 288, "vision_config.vision_output_dim": 54,
        "vision_config.projector_input_dim": 54, "vision_config.projector_output_dim": 54},
    "DINOv3ViTModel": {"hidden_size": 72},  # rotary embeddings of two dimensions
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "blt": {
        part: {"hidden_size": 54, "hidden_size_global": 54, "num_attention_heads": 9,
               "num_hidden_layers": 3, "intermediate_size": 88, **more}
        for part, more in {
            "encoder_config": {}, "decoder_config": {},
            "patcher_config": {"vocab_size": 260}, "global_config": {},
        }.items()
    } | {"encoder_hash_byte_group_vocab": 103, "encoder_hash_byte_group_size": [3, 4]},
    "cohere_compass_text": {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4}
        for kind in ("full_attention", "sliding_attention")}},
    "deepseek_v4": {"o_groups": 3, "o_lora_rank": 13},
    # Its two calls split the values, so the key-value heads are even.
    "diffllama": {"hidden_size": 72, "num_attention_heads": 12, "num_key_value_heads": 4,
                  "head_dim": 6},
    "dots1": {"n_shared_experts": 3, "n_routed_experts": 5},
    "dots3_note_text": {**_LATENT, "head_dim": 16, "n_routed_experts": 5,
                        "index_head_dim": 16,
                        **{f"swa_{key}": size for key, size in {
                            "num_attention_heads": 9, "num_key_value_heads": 9,
                            "q_lora_rank": 38, "kv_lora_rank": 22, "head_dim": 16,
                            "qk_nope_head_dim": 10, "v_head_dim": 12}.items()}},
    "granitemoehybrid": {**_MAMBA, "shared_intermediate_size": 46,
                         "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "helium": {"head_dim": 6},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": {**_LATENT, "ffn_hidden_size": 88, "expert_ffn_hidden_size": 34, "moe_topk": 3,
                      "zero_expert_num": 3, "head_dim": 6},
    "mamba2": {"num_heads": 9, "head_dim": 12, "state_size": 8, "n_groups": 3},
    "mimo_v2_flash": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "musicgen": _ONE_CODEBOOK,
    "musicgen_melody": _ONE_CODEBOOK,
    "prophetnet": {"num_decoder_attention_heads": 9, "num_encoder_attention_heads": 9,
                   "num_decoder_layers": 3, "num_encoder_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_shape": [6, 11], "axial_pos_embds_dim": [18, 36],
                 "max_position_embeddings": 66,
                 "attn_layers": ["local", "local", "local"], "feed_forward_size": 88,
                 "local_attn_chunk_length": 11, "attention_head_size": 6},
    "xlm": {"emb_dim": 54, "n_heads": 9, "n_words": 101},
    "xlnet": {"d_model": 54, "n_head": 9, "d_inner": 88, "n_layer": 3},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 5, "layers_block_type": [
        "linear_attention", "hybrid", "linear_attention", "linear_attention", "hybrid"],
        "attention_hidden_size": 108, "attention_head_dim": 12, "num_key_value_heads": 9,
        "n_mamba_heads": 3, "mamba_dt_rank": 5, "mamba_d_state": 8},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# Types whose own model cannot be made here, and what stands in for it.
STAND_INS: Mapping[str, str] = {
    "dots3_note": "dots3_note_text",  # the same decoder, behind encoders for images and sound
    "gemma3n": "gemma3n_text",  # its vision tower needs another package
    "gemma4_assistant": "gemma4_text",  # it shares the cache of the model that it assists
    "gemma4_unified_assistant": "gemma4_text",
}


def of_the_zoo(name: str) -> bool:
    """Whether the zoo's model is taken, which other tests convert and compare as well."""
    if name in VARIANTS:
        return True
    entry = zoo.ZOO.get(name)
    return (
        entry is not None
        and name not in OVERRIDES
        and entry.model_type == name
        and not entry.architecture
    )


def config_of(model_type: str) -> PreTrainedConfig:
    """The configuration of a tiny model of that type."""
    if of_the_zoo(model_type):
        return zoo.make_config(zoo.ZOO[model_type])
    config_class = CONFIG_MAPPING[model_type]
    return _config(config_class, OVERRIDES.get(model_type, {}))


def _config(config_class: type[PreTrainedConfig], given: Mapping[str, Any]) -> PreTrainedConfig:
    sizes = _shrunk(config_class)
    for name, value in given.items():
        part, _, key = name.partition(".")
        sizes[part] = {**sizes[part], key: value} if key else value
    return config_class(**sizes)


_LAYERS = SIZES["num_hidden_layers"]


def _shrunk(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    declared = zoo._fields(config_class)
    sizes = {key: size for key, size in MORE_SIZES.items() if key in declared}
    default = config_class()
    for key in declared & {"layer_types", "mlp_layer_types"}:
        kinds = list(dict.fromkeys(getattr(default, key) or ()))
        if len(kinds) > 1:  # so few layers would have the first kind only
            sizes[key] = [kinds[layer % len(kinds)] for layer in range(_LAYERS)]
    if config_class.sub_configs:
        for key in config_class.sub_configs:
            nested = getattr(default, key, None)
            if isinstance(nested, PreTrainedConfig):
                sizes[key] = {"model_type": nested.model_type, **_shrunk(type(nested))}
    return sizes


def _class_of(name: str) -> tuple[Any, PreTrainedConfig]:
    """The model class of a type or of a class's own name, and its tiny configuration."""
    if name in CLASSES:
        model_class: Any = getattr(openelm if name in vars(openelm) else transformers, name)
        config_class = model_class.config_class
        return model_class, _config(config_class, OVERRIDES.get(name, {}))
    config = config_of(STAND_INS.get(name, name))
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if isinstance(model_class, (tuple, list)):
        model_class = model_class[0]
    if not isinstance(config, model_class.config_class):  # that of a whole, for its decoder
        parts = (getattr(config, key) for key in config.sub_configs)
        fitting = (part for part in parts if isinstance(part, model_class.config_class))
        config = next(fitting, config)
    return model_class, config


def build(name: str) -> Any:
    """The model with every parameter drawn at random, in float64."""
    with torch.random.fork_rng(devices=[]):
        if name in VARIANTS:
            model: Any = zoo.build(zoo.ZOO[name])
        else:
            model_class, config = _class_of(name)
            model = model_class(config)
    zoo._randomise(model, torch.Generator().manual_seed(0))
    return model.eval()


def save(name: str, folder: Path) -> None:
    """Its checkpoint, stored in float64."""
    build(name).double().save_pretrained(folder)  # `to` would make complex buffers real
