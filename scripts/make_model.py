"""A checkpoint of random weights in the shape of a known model, to be measured without a download.

    python scripts/make_model.py smollm-135m FOLDER [--dtype bfloat16]
    normconvert bench FOLDER

How long a model takes does not depend on its weights. Gains and biases are random, too, so that a
conversion has something to do.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SHAPES: dict[str, dict[str, Any]] = {
    "smollm-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "gpt2": {"model_type": "gpt2"},  # the configuration's defaults are those of the small one
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    options = parser.parse_args()
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SHAPES[options.shape])
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    model.to(getattr(torch, options.dtype)).save_pretrained(options.folder)


if __name__ == "__main__":
    main()
