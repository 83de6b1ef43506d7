"""Models too large to load: traced and planned from their headers, in bounded time and memory."""

from __future__ import annotations

import json
import math
import os
import subprocess
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
        ("llama", "LlamaForCausalLM", LLAMA_405B, 1137, 253, 60, 1000),
        pytest.param(
            *("deepseek_v3", "DeepseekV3ForCausalLM", DEEPSEEK_671B, 45395, 245, 90, 1200),
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
    process = subprocess.Popen(
        [*COMMAND, "inspect", "model"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout as out:
        said = out.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert f"{norms} of {norms} norms fold" in said
    assert f" of {tensors} tensors would change" in said
    assert usage.ru_utime + usage.ru_stime < seconds
    assert usage.ru_maxrss / 1024 < mebibytes
