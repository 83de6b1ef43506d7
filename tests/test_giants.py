"""Models too large to load: traced and planned from their headers, in bounded time and memory."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from command_line import COMMAND, environment
from normconvert.source import encode_header

LLAMA_405B = {
    "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
    "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
DEEPSEEK_671B: dict[str, int] = {}  # what its class has by default
SHARD_BYTES = 4_300_000_000
MEASURED = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
taken = resource.getrusage(resource.RUSAGE_CHILDREN)
print("taken:", taken.ru_utime + taken.ru_stime, taken.ru_maxrss)
"""


def make_sparse(folder: Path, model_type: str, architecture: str, sizes: dict[str, int]) -> None:
    """A bfloat16 checkpoint whose shards are headers and holes."""
    config = AutoConfig.for_model(model_type, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.mkdir()
    content = {**config.to_dict(), "architectures": [architecture], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(content))
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in stored(model):
        if filled > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, "BF16", shape))
        filled += 2 * math.prod(shape)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        path = folder / f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        header = encode_header(shard, (("format", "pt"),))
        path.write_bytes(header)
        os.truncate(path, len(header) + sum(2 * math.prod(shape) for _, _, shape in shard))
        weight_map |= {name: path.name for name, _, _ in shard}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def stored(model: Any) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors of `model` as they are on disk: each expert has its own."""
    found = []
    for name, tensor in model.state_dict().items():
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            found.append((name, tuple(tensor.shape)))
            continue
        path, _, kind = name.rpartition(".")
        rows, columns = tensor.shape[1:]
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        for expert in range(len(tensor)):
            shape = (rows // len(parts), columns)
            found += [(f"{path}.{expert}.{part}.weight", shape) for part in parts]
    return found


@pytest.mark.parametrize(
    ("model_type", "architecture", "sizes", "tensors", "norms", "seconds", "mebibytes"),
    [
        ("llama", "LlamaForCausalLM", LLAMA_405B, 1137, 253, 30, 1000),
        pytest.param(
            *("deepseek_v3", "DeepseekV3ForCausalLM", DEEPSEEK_671B, 45395, 245, 45, 1200),
            marks=pytest.mark.coverage,
        ),
    ],
)
def test_a_giant_is_inspected(
    model_type: str,
    architecture: str,
    sizes: dict[str, int],
    tensors: int,
    norms: int,
    seconds: float,
    mebibytes: float,
    tmp_path: Path,
) -> None:
    """The limits are a few times what a quiet machine takes: of the processor, not of the clock."""
    make_sparse(tmp_path / "model", model_type, architecture, sizes)
    # Not started from here: what a process took before its `exec`, as a copy of this one, counts.
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *COMMAND, "inspect", "model"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    said, _, taken = done.stdout.rpartition("taken: ")
    took, kibibytes = map(float, taken.split())
    assert f"{norms} of {norms} norms fold" in said
    assert f" of {tensors} tensors would change" in said
    assert took < seconds
    assert kibibytes / 1024 < mebibytes
