"""How long a training step takes on this CPU: with LayerNorm, as_rmsnorm and as_crmsnorm.

python scripts/bench_train.py [--threads N] [--steps 20] [--dtype float32] [--json]

A step is forward, backward and AdamW. The three models take turns, and the time is the process's
own, so what else the machine does matters little.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from typing import TYPE_CHECKING

import torch
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification
from transformers.utils import logging

from normconvert.train import as_crmsnorm, as_rmsnorm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PreTrainedModel

BATCHES = (1, 8)


def gpt2(batch: int) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """4 layers of GPT-2 small, 128 tokens."""
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(n_layer=4, vocab_size=1000, **dropout))
    ids = torch.randint(0, 1000, (batch, 128))
    return model, {"input_ids": ids, "labels": ids}


def vit(batch: int) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """4 layers of ViT-small, 197 positions."""
    config = ViTConfig(
        hidden_size=384, intermediate_size=1536, num_attention_heads=6, num_hidden_layers=4
    )
    images = torch.randn(batch, 3, 224, 224)
    labels = torch.zeros(batch, dtype=torch.int64)
    return ViTForImageClassification(config), {"pixel_values": images, "labels": labels}


def training(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> Callable[[], float]:
    """A function that takes one step and gives the seconds it took."""
    model.to(dtype).train()
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)

    def step() -> float:
        start = time.process_time()
        optimizer.zero_grad()
        model(**given).loss.backward()
        optimizer.step()
        return time.process_time() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    rows = []
    for make in (gpt2, vit):
        for batch in BATCHES:
            original, inputs = make(batch)
            models = {
                "LayerNorm": original,
                "as_rmsnorm": as_rmsnorm(copy.deepcopy(original)),
                "as_crmsnorm": as_crmsnorm(copy.deepcopy(original)),
            }
            dtype = getattr(torch, options.dtype)
            steps = {name: training(model, inputs, dtype) for name, model in models.items()}
            times: dict[str, list[float]] = {name: [] for name in steps}
            for _ in range(options.steps + 2):
                for name, step in steps.items():
                    times[name].append(step())
            baseline = times["LayerNorm"][2:]
            for name, all_of_them in times.items():
                taken = all_of_them[2:]  # the first ones allocate
                ratio = statistics.median(a / b for a, b in zip(taken, baseline, strict=True))
                median = statistics.median(taken)
                rows.append({"model": make.__name__, "batch": batch, "norms": name})
                rows[-1] |= {"milliseconds": median * 1e3, "ratio": ratio}
                if not options.json:
                    print(
                        f"{make.__name__:6}{batch:4} {name:12}{median * 1e3:9.1f} ms {ratio:6.3f} ×"
                    )
    if options.json:
        head = {"torch": torch.__version__, "threads": options.threads, "dtype": options.dtype}
        print(json.dumps({**head, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
