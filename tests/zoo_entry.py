"""What an entry of the zoo is, and the sizes that entries share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
    # 25 patches and a class token.
    "image_size": 15,
    "patch_size": 3,
    "num_channels": 5,
}

PARTIAL_ROTARY: Mapping[str, Any] = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.6,
    },
}
# For classes that derive the head size: wide enough to rotate 6 of a head's 10 coordinates.
PARTIAL_ROTARY_WIDE: Mapping[str, Any] = {**PARTIAL_ROTARY, "hidden_size": 90}
