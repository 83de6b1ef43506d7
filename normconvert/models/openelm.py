"""OpenELM (arXiv 2404.14619): a decoder whose layers differ in their numbers of heads and widths.

Pre-RMSNorm, fused query, key and value, RMSNorm on queries and keys in front of a half-split rotary
embedding, grouped-query attention, a gated feed-forward network. The modules are named as the
tensors of its checkpoints, which bring code for transformers 4.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from normconvert.models.openelm_config import OpenELMConfig

_EPS = 1e-6

# What transformers calls the cache: the new name since 5.24.
_CACHE = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"


class OpenELMRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    """x / sqrt(mean(x²) + 1e-6) · weight, [..., size] → [..., size], in float32 inside."""

    def __init__(self, size: int) -> None:
        super().__init__(size, eps=_EPS)


class OpenELMAttention(nn.Module):
    """Causal attention of one layer, [batch, length, d] → the same."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        assert config.num_query_heads is not None
        assert config.num_kv_heads is not None
        self.config, self.layer_idx, self.head_dim = config, layer, config.head_dim
        self.heads = config.num_query_heads[layer], config.num_kv_heads[layer]
        self.num_key_value_groups = self.heads[0] // self.heads[1]
        self.is_causal = True
        size = self.head_dim
        self.qkv_proj = nn.Linear(
            config.model_dim, (self.heads[0] + 2 * self.heads[1]) * size, bias=False
        )
        self.q_norm = OpenELMRMSNorm(size) if config.normalize_qk_projections else None
        self.k_norm = OpenELMRMSNorm(size) if config.normalize_qk_projections else None
        self.out_proj = nn.Linear(self.heads[0] * size, config.model_dim, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output, and the attention weights where the implementation has them."""
        batch, length, _ = hidden_states.shape
        queries, keys = self.heads
        fused = self.qkv_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k, v = fused.split((queries, keys, keys), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self, q, k, v, attention_mask, dropout=0.0, scaling=self.head_dim**-0.5, **kwargs
        )
        return self.out_proj(output.reshape(batch, length, -1).contiguous()), weights


class OpenELMFeedForward(nn.Module):
    """[..., d] → [..., d]; with a gate, `proj_1` gives first the gate, then the up projection."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        width = config.ffn_width(layer)
        self.gated = config.ffn_with_glu
        self.proj_1 = nn.Linear(config.model_dim, (1 + self.gated) * width, bias=False)
        self.proj_2 = nn.Linear(width, config.model_dim, bias=False)
        self.act = ACT2FN[config.activation_fn_name]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.proj_1(hidden_states)
        if self.gated:
            gate, up = hidden_states.chunk(2, dim=-1)
            hidden_states = self.act(gate) * up
        else:
            hidden_states = self.act(hidden_states)
        output: torch.Tensor = self.proj_2(hidden_states)
        return output


class OpenELMDecoderLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        self.attn = OpenELMAttention(config, layer)
        self.ffn = OpenELMFeedForward(config, layer)
        self.attn_norm = OpenELMRMSNorm(config.model_dim)
        self.ffn_norm = OpenELMRMSNorm(config.model_dim)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended, _ = self.attn(self.attn_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        output: torch.Tensor = hidden_states + self.ffn(self.ffn_norm(hidden_states))
        return output


class OpenELMPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What the two models share with transformers' own."""

    config_class = OpenELMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["OpenELMDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, type[nn.Module]]] = {
        "hidden_states": OpenELMDecoderLayer,
        "attentions": OpenELMAttention,
    }
    _input_embed_layer = "token_embeddings"


class OpenELMModel(OpenELMPreTrainedModel):
    """Token ids [batch, length] → hidden states [batch, length, d] behind the final norm."""

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(
            OpenELMDecoderLayer(config, layer) for layer in range(config.num_transformer_layers)
        )
        self.norm = OpenELMRMSNorm(config.model_dim)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As every decoder of transformers. The cache is one, under its old or its new name.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        hidden_states = self.token_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            length, device = hidden_states.shape[1], hidden_states.device
            position_ids = torch.arange(seen, seen + length, device=device).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{_CACHE: cache},
        )
        rotary = self._rotary(position_ids, hidden_states.dtype)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=rotary,
                attention_mask=mask,
                cache=cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            **{_CACHE: cache if use_cache else None},
        )

    def _rotary(
        self, position_ids: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, each [batch, length, head size]; the two halves turn together."""
        size = self.config.head_dim
        exponents = torch.arange(0, size, 2, device=position_ids.device).to(torch.float32) / size
        frequencies = self.config.rope_freq_constant**-exponents
        angles = position_ids[..., None].to(torch.float32) * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class OpenELMForCausalLM(OpenELMPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """OpenELM with its output head, tied to the embedding where the configuration says so."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "lm_head.weight": "transformer.token_embeddings.weight"
    }

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.transformer = OpenELMModel(config)
        self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, length, vocabulary].

        Of the last `logits_to_keep` positions if it is a number other than 0, or of those that it
        lists.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        last = isinstance(logits_to_keep, int)
        kept = slice(-logits_to_keep, None) if last else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{_CACHE: getattr(outputs, _CACHE)},
        )


AutoModel.register(OpenELMConfig, OpenELMModel, exist_ok=True)
AutoModelForCausalLM.register(OpenELMConfig, OpenELMForCausalLM, exist_ok=True)
