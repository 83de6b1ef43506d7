"""The configuration of OpenELM (arXiv 2404.14619), by the names of its checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

if TYPE_CHECKING:
    from collections.abc import Sequence


@strict
class OpenELMConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes per layer: `num_query_heads`, `num_kv_heads` and `ffn_multipliers` have one each.

    `share_input_output_layers` ties the head to the embedding. What only the making of those lists
    was about (`qkv_multipliers`, `num_gqa_groups`, `rope_max_length`) is kept and not read.

    Raises:
        ValueError: a list has not one entry per layer.
    """

    model_type = "openelm"
    keys_to_ignore_at_inference = ("cache", "past_key_values")
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_transformer_layers",
        "max_position_embeddings": "max_context_length",
        "tie_word_embeddings": "share_input_output_layers",
    }

    vocab_size: int = 32000
    max_context_length: int = 2048
    num_transformer_layers: int = 12
    model_dim: int = 2048
    head_dim: int = 128
    num_query_heads: list[int] | None = None
    num_kv_heads: list[int] | None = None
    ffn_multipliers: list[float] | list[int] | None = None
    ffn_dim_divisor: int = 256
    ffn_with_glu: bool = True
    activation_fn_name: str = "swish"
    normalize_qk_projections: bool = True
    share_input_output_layers: bool = True
    rope_freq_constant: int | float = 10000
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        layers, heads = self.num_transformer_layers, max(1, self.model_dim // self.head_dim)
        self.num_query_heads = _per_layer("num_query_heads", self.num_query_heads, heads, layers)
        self.num_kv_heads = _per_layer("num_kv_heads", self.num_kv_heads, heads, layers)
        self.ffn_multipliers = _per_layer("ffn_multipliers", self.ffn_multipliers, 4.0, layers)
        super().__post_init__(**kwargs)

    def ffn_width(self, layer: int) -> int:
        """The hidden size of a layer's feed-forward network.

        Multiplier times `model_dim`, rounded to a multiple of `ffn_dim_divisor`, but by not more
        than 10% down.
        """
        assert self.ffn_multipliers is not None
        wanted, divisor = self.ffn_multipliers[layer] * self.model_dim, self.ffn_dim_divisor
        width = max(divisor, int(wanted + divisor / 2) // divisor * divisor)
        return width if width >= 0.9 * wanted else width + divisor


def _per_layer(name: str, given: Sequence[Any] | None, default: float, layers: int) -> list[Any]:
    if given is None:
        return [default] * layers
    if len(given) != layers:
        raise ValueError(f"{name} has {len(given)} entries for {layers} layers")
    return list(given)


AutoConfig.register("openelm", OpenELMConfig, exist_ok=True)
