"""How fast engines run converted checkpoints: median times, and ratios to the original's.

python scripts/bench_engines.py [--layers N] [--threads N] [--seconds S] [--engine ENGINE]
    [--processor-time] [--json]

Random models with the layers of SmolLM-135M and of GPT-2, but fewer, and a vocabulary of 8192, in
float32. Runs alternate with the original's, so what else the machine does falls on both alike; the
original against itself shows how much is noise. Where the machine is busy, --threads 1
--processor-time leaves out the time in which others ran.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from serving import ENGINES, Engine, Ids
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

import normconvert

Clock: TypeAlias = Callable[[], float]  # seconds

VOCABULARY = 8192  # a sixth of theirs: the head must not outweigh few layers
SHAPES = ((1, 128), (1, 1))  # a prompt, one token
LINE = (
    "{model:6} {engine:13} {checkpoint:18} {shape!s:9}"
    "{milliseconds:9.2f} ms {ratio:5.2f} × original"
)
# The rewrite, the format, what is done with tied embeddings.
CONVERSIONS: dict[str, tuple[tuple[Any, Any, Any], ...]] = {
    "Llama": (("flashnorm", "stock", "keep"), ("flashnorm", "native", "keep")),
    "GPT-2": (
        ("flashnorm", "stock", "keep"),
        ("rmsnorm", "native", "untie"),
        ("crmsnorm", "native", "untie"),
    ),
}


def configurations(layers: int) -> dict[str, PreTrainedConfig]:
    shared = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    return {
        "Llama": LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            **shared,
        ),
        "GPT-2": GPT2Config(n_embd=768, n_head=12, n_layer=layers, **shared),
    }


def checkpoints(name: str, config: PreTrainedConfig, folder: Path) -> dict[str, Path]:
    """The original, and what normconvert makes of it."""
    original = folder / "original"
    save(config, original)
    found = {"original": original}
    for rewrite, form, tied in CONVERSIONS[name]:
        output = folder / f"{rewrite}-{form}"
        normconvert.convert(original, output, rewrite, format=form, tied=tied, verify=False)
        found[f"{rewrite}, {form}"] = output
    return found


def save(config: PreTrainedConfig, folder: Path) -> None:
    """A random model with gains that are not 1, and a tokenizer, which CTranslate2 asks for."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    words = {f"word{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="word0"))
    named = {"unk_token": "word0", "bos_token": "word1", "eos_token": "word2"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)


def compare(
    runs: dict[str, Engine], ids: Ids, budget: float, clock: Clock
) -> Iterator[tuple[str, float, float]]:
    """The median seconds of every run, and its median ratio to the first, run just before it."""
    baseline = next(iter(runs))
    for name in runs:
        pair = [runs[name], runs[baseline]]
        for run in pair * 3:
            run(ids)
        times: list[tuple[float, float]] = []
        end = time.perf_counter() + budget
        while len(times) < 5 or time.perf_counter() < end:
            one, other = (seconds(run, ids, clock) for run in pair)
            times.append((one, other))
        ratio = statistics.median(one / other for one, other in times)
        yield name, statistics.median(one for one, _ in times), ratio


def seconds(run: Engine, ids: Ids, clock: Clock) -> float:
    start = clock()
    run(ids)
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=5, help="of every comparison")
    parser.add_argument("--engine", choices=ENGINES, action="append", help="all if not given")
    parser.add_argument("--processor-time", action="store_true", help="not the clock on the wall")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    clock = time.process_time if options.processor_time else time.perf_counter
    logging.disable_progress_bar()
    rows = []
    for name, config in configurations(options.layers).items():
        with tempfile.TemporaryDirectory() as folder:
            made = checkpoints(name, config, Path(folder))
            for engine in options.engine or ENGINES:
                for row in measure(engine, made, options.threads, options.seconds, clock):
                    rows.append({"model": name, "engine": engine, **row})
                    if not options.json:
                        print(LINE.format(**rows[-1]), flush=True)
    if options.json:
        versions = {engine: version(engine) for engine in ("torch", *ENGINES)}
        head = {"versions": versions, "threads": options.threads}
        print(json.dumps({**head, "rows": rows}, indent=2))


def measure(
    engine: str, made: dict[str, Path], threads: int, budget: float, clock: Clock
) -> Iterator[dict[str, Any]]:
    """A row for every checkpoint that the engine takes, and every shape."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for i, (name, checkpoint) in enumerate(made.items()):
            if engine == "ctranslate2" and "native" in name:
                continue  # it knows no such model type
            work = Path(folder, str(i))
            work.mkdir()
            runs[name] = ENGINES[engine](checkpoint, work, threads)
        for shape in SHAPES:
            ids = np.random.default_rng(0).integers(3, VOCABULARY, shape)
            for name, median, ratio in compare(runs, ids, budget, clock):
                row = {"checkpoint": name, "shape": shape}
                yield {**row, "milliseconds": median * 1e3, "ratio": ratio}


if __name__ == "__main__":
    main()
