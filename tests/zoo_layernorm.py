"""The entries of the zoo with LayerNorms: decoders, encoders, encoder-decoders, vision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo_entry import PARTIAL_ROTARY, PARTIAL_ROTARY_WIDE, Entry

_GPT2_SIZES: Mapping[str, Any] = {
    "n_embd": 54,
    "n_inner": 88,
    "n_head": 9,
    "n_layer": 3,
    "n_positions": 64,
}
_GPT_NEO: Mapping[str, Any] = {
    "num_heads": 9,
    "num_layers": 3,
    "attention_types": [[["global", "local", "global"], 1]],
    "window_size": 4,
}
_OPT: Mapping[str, Any] = {"ffn_dim": 88, "word_embed_proj_dim": 54}
_BLOOM: Mapping[str, Any] = {"n_head": 9, "n_layer": 3}
_ENCODER_DECODER: Mapping[str, Any] = {
    "d_model": 54,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 9,
    "decoder_attention_heads": 9,
    "encoder_ffn_dim": 88,
    "decoder_ffn_dim": 92,
    "decoder_start_token_id": 1,
}
# Two labels, the default, are the batch of a trace.
_CLASSES: Mapping[str, Any] = {"id2label": {number: f"label {number}" for number in range(11)}}

DECODERS: Mapping[str, Entry] = {
    "gpt2": Entry(model_type="gpt2", config=_GPT2_SIZES),
    "gpt2_untied": Entry(model_type="gpt2", config={**_GPT2_SIZES, "tie_word_embeddings": False}),
    "gpt_bigcode": Entry(model_type="gpt_bigcode", config=_GPT2_SIZES),
    "gpt_neo": Entry(model_type="gpt_neo", config=_GPT_NEO),
    "gpt_neox": Entry(model_type="gpt_neox", config=PARTIAL_ROTARY_WIDE),
    "gpt_neox_sequential": Entry(
        model_type="gpt_neox", config={**PARTIAL_ROTARY_WIDE, "use_parallel_residual": False}
    ),
    "gpt_neox_tied": Entry(
        model_type="gpt_neox", config={**PARTIAL_ROTARY_WIDE, "tie_word_embeddings": True}
    ),
    "gptj": Entry(model_type="gptj", config={**_GPT2_SIZES, "n_embd": 90, "rotary_dim": 6}),
    # CodeGen splits its fused projection into four blocks, so its heads must divide by 4.
    "codegen": Entry(
        model_type="codegen",
        config={**_GPT2_SIZES, "n_embd": 60, "n_head": 4, "rotary_dim": 6, "n_ctx": 64},
    ),
    "opt": Entry(model_type="opt", config=_OPT),
    "opt_untied": Entry(model_type="opt", config={**_OPT, "tie_word_embeddings": False}),
    "opt_post_norm": Entry(model_type="opt", config={**_OPT, "do_layer_norm_before": False}),
    "opt_projected": Entry(model_type="opt", config={**_OPT, "word_embed_proj_dim": 38}),
    # As in OPT-350m, the one size that normalizes after adding.
    "opt_projected_post_norm": Entry(
        model_type="opt",
        config={**_OPT, "word_embed_proj_dim": 38, "do_layer_norm_before": False},
    ),
    "bloom": Entry(model_type="bloom", config=_BLOOM),
    "bloom_untied": Entry(model_type="bloom", config={**_BLOOM, "tie_word_embeddings": False}),
    "bloom_post_norm_residual": Entry(
        model_type="bloom", config={**_BLOOM, "apply_residual_connection_post_layernorm": True}
    ),
    "mpt": Entry(
        model_type="mpt", config={"d_model": 54, "n_heads": 9, "n_layers": 3, "max_seq_len": 64}
    ),
    "falcon": Entry(model_type="falcon", config={"ffn_hidden_size": 88, "bias": True}),
    "falcon_new": Entry(
        model_type="falcon",
        config={"ffn_hidden_size": 88, "num_kv_heads": 3, "new_decoder_architecture": True},
    ),
    "falcon_sequential": Entry(
        model_type="falcon",
        config={
            "ffn_hidden_size": 88,
            "bias": True,
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
        },
    ),
    "biogpt": Entry(model_type="biogpt"),
    "xglm": Entry(
        model_type="xglm",
        config={"d_model": 54, "ffn_dim": 88, "num_layers": 3, "attention_heads": 9},
    ),
    "phi": Entry(model_type="phi", config=PARTIAL_ROTARY_WIDE),
    "persimmon": Entry(model_type="persimmon", config=PARTIAL_ROTARY_WIDE),
    "fuyu": Entry(
        model_type="fuyu",
        config={
            "text_config": {
                "model_type": "persimmon",
                "vocab_size": 101,
                "intermediate_size": 88,
                "num_hidden_layers": 3,
                "num_attention_heads": 9,
                "max_position_embeddings": 64,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 3,
                **PARTIAL_ROTARY_WIDE,
            }
        },
    ),
    "stablelm": Entry(model_type="stablelm", config={**PARTIAL_ROTARY_WIDE, "use_qkv_bias": True}),
    "stablelm_parallel": Entry(
        model_type="stablelm",
        config={**PARTIAL_ROTARY_WIDE, "use_parallel_residual": True, "qk_layernorm": True},
    ),
    "starcoder2": Entry(model_type="starcoder2"),
    "cohere": Entry(model_type="cohere"),
    "cohere_qk_norm": Entry(model_type="cohere", config={"use_qk_norm": True}),
    "cohere2": Entry(
        model_type="cohere2",
        config={
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "olmo": Entry(model_type="olmo"),
    "nemotron": Entry(model_type="nemotron", config=PARTIAL_ROTARY),
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
}

ENCODERS: Mapping[str, Entry] = {
    "bert": Entry(model_type="bert", config={"type_vocab_size": 5}, architecture="BertForMaskedLM"),
    "clip_text_model": Entry(
        model_type="clip_text_model",
        config={"projection_dim": 38},
        architecture="CLIPTextModel",
    ),
    "pegasus": Entry(
        model_type="pegasus",
        config=_ENCODER_DECODER,
        architecture="PegasusForConditionalGeneration",
    ),
    "whisper": Entry(
        model_type="whisper",
        config={
            **_ENCODER_DECODER,
            "num_mel_bins": 20,
            "max_source_positions": 17,
            "max_target_positions": 48,
            "begin_suppress_tokens": None,
        },
        architecture="WhisperForConditionalGeneration",
    ),
    "vit": Entry(model_type="vit", config={"pooler_output_size": 46}, architecture="ViTModel"),
    "vit_classifier": Entry(
        model_type="vit",
        config={**_CLASSES, "pooler_output_size": 46},
        architecture="ViTForImageClassification",
    ),
    "dinov2": Entry(model_type="dinov2", config={"mlp_ratio": 4}, architecture="Dinov2Model"),
    "dinov2_classifier": Entry(
        model_type="dinov2",
        config={**_CLASSES, "mlp_ratio": 4},
        architecture="Dinov2ForImageClassification",
    ),
    "siglip_vision_model": Entry(
        model_type="siglip_vision_model", architecture="SiglipVisionModel"
    ),
    "clip_vision_model": Entry(
        model_type="clip_vision_model",
        config={"projection_dim": 38},
        architecture="CLIPVisionModel",
    ),
}

LAYERNORM: Mapping[str, Entry] = {**DECODERS, **ENCODERS}
