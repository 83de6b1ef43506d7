"""Time and memory of a conversion, beside `cp -r` and transformer-tricks.

    python scripts/bench_convert.py [--gb 2.2] [--runs 5] [--json FILE]
        [--with-transformer-tricks /tmp/tricks/bin/python]

makes a random bfloat16 Llama of that size and times, in turn, with the source in the page cache:

    cp          cp -r
    rewrite     the rewrite pass alone: the plan is made before the clock starts
    normconvert the whole process: normconvert flashnorm --no-verify
    tricks      the whole process: transformer_tricks.flashify_repo, without its question to the Hub

Every round starts with another of them, and a ratio is the median of the ratios within a round:
other work on the machine slows both. transformer-tricks lives in an environment
of its own:

    python -m venv /tmp/tricks
    /tmp/tricks/bin/pip install torch==2.13.0 transformer-tricks==0.4.1
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np

from normconvert.ir.event import ignore
from normconvert.source import encode_header, open_checkpoint

Entry = tuple[str, str, tuple[int, ...]]

SHARD_BYTES = 5_000_000_000
TRICKS = """
import sys, transformer_tricks as tricks
tricks.repo_exists = lambda repo: False
tricks.flashify_repo(sys.argv[1], sys.argv[2])
"""
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one process took; `peak_mib` is its largest resident set."""

    seconds: float
    peak_mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gb", type=float, default=2.2, help="size of the checkpoint")
    parser.add_argument("--runs", type=int, default=5, help="rounds")
    parser.add_argument("--with-transformer-tricks", metavar="PYTHON", help="see above")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run here")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--rewrite", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rewrite:
        print(time_rewrite(*options.rewrite))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source, output = Path(name, "source"), Path(name, "output")
        make_llama(source, round(options.gb * 1e9))
        runs = compare(commands(source, output, options.with_transformer_tricks), options.runs)
    show(runs)
    if options.json:
        document = {name: [asdict(run) for run in each] for name, each in runs.items()}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def commands(source: Path, output: Path, tricks: str | None) -> dict[str, list[str]]:
    """The contestants; each makes `output` from `source`."""
    paths = [str(source), str(output)]
    convert = ["flashnorm", paths[0], "--output", paths[1], "--no-verify", "--force"]
    found = {
        "cp": ["cp", "-r", *paths],
        "rewrite": [sys.executable, __file__, "--rewrite", *paths],
        "normconvert": [sys.executable, "-m", "normconvert", *convert],
    }
    return found | ({"tricks": [tricks, "-c", TRICKS, *paths]} if tricks else {})


def compare(commands: dict[str, list[str]], rounds: int) -> dict[str, list[Run]]:
    """`rounds` runs of each command, after one that does not count."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    names = list(commands)
    source, output = (Path(path) for path in commands["cp"][-2:])
    for name in names:
        run(commands[name], source, output)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            runs[name].append(run(commands[name], source, output))
            print(f"round {turn + 1}: {name} {runs[name][-1].seconds:.2f} s", file=sys.stderr)
    return runs


def run(command: list[str], source: Path, output: Path) -> Run:
    """Run `command` on a warm `source`, then remove its `output`."""
    for path in source.iterdir():
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
    os.sync()
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}  # installed code is compiled code
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{command} failed")
    shutil.rmtree(output)
    if "--rewrite" in command:
        seconds = float(printed)
    return Run(seconds=seconds, peak_mib=usage.ru_maxrss / 1024)


def time_rewrite(source: Path, output: Path) -> float:
    """Seconds that the rewrite pass takes by itself."""
    from normconvert.planner import make_plan
    from normconvert.rewrite import write
    from normconvert.trace import trace

    checkpoint = open_checkpoint(str(source))
    plan = make_plan(trace(checkpoint), checkpoint, ("flashnorm",))
    output.mkdir()
    start = time.perf_counter()
    write(plan, checkpoint, output, {}, ignore)
    return time.perf_counter() - start


def show(runs: dict[str, list[Run]]) -> None:
    print(f"{'':12}{'median s':>10}{'x cp':>8}{'x normconvert':>15}{'peak MiB':>10}")
    for name, each in runs.items():
        seconds = median(run.seconds for run in each)
        peak = max(run.peak_mib for run in each)
        ratios = [ratio(each, runs[other]) for other in ("cp", "normconvert")]
        print(f"{name:12}{seconds:10.2f}{ratios[0]:8.2f}{ratios[1]:15.2f}{peak:10.0f}")


def ratio(runs: list[Run], others: list[Run]) -> float:
    """How many times as long, in the median of the rounds."""
    return median(run.seconds / other.seconds for run, other in zip(runs, others, strict=True))


def make_llama(folder: Path, nbytes: int) -> None:
    """A Llama of about `nbytes` bytes: random weights, random gains, an untied head."""
    wide = nbytes > 4e9
    hidden, intermediate, key_value = (4096, 11008, 1024) if wide else (2048, 5632, 256)
    vocabulary = 32000
    shapes = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    outside = 2 * 2 * vocabulary * hidden
    layers = max(1, round((nbytes - outside) / sum(2 * _size(each) for each in shapes.values())))
    entries: list[Entry] = [("model.embed_tokens.weight", "BF16", (vocabulary, hidden))]
    for i in range(layers):
        entries += [(f"model.layers.{i}.{at}.weight", "BF16", s) for at, s in shapes.items()]
    entries += [("model.norm.weight", "BF16", (hidden,))]
    entries += [("lm_head.weight", "BF16", (vocabulary, hidden))]
    heads = hidden // 128
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads * key_value // hidden,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))  # transformer-tricks needs one
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    write_weights(folder, entries)


def write_weights(folder: Path, entries: list[Entry]) -> None:
    """Random values in one file, or in shards with an index."""
    shards = list(_shards(entries))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        places = zip(names, shards, strict=True)
        weight_map = {tensor: name for name, shard in places for tensor, _, _ in shard}
        index = {"metadata": {"total_size": _bytes(entries)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    random = np.random.default_rng(0)
    noise = 0.02 * random.standard_normal(1 << 21, dtype=np.float32)
    weights = (noise.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # cut to bfloat16
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            file.write(encode_header(shard, (("format", "pt"),)))
            for _, _, shape in shard:
                if len(shape) == 1:
                    gain = random.uniform(0.5, 1.5, shape).astype(np.float32)
                    file.write((gain.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                    continue
                left = 2 * _size(shape)
                while left:
                    left -= file.write(weights[: min(left, len(weights))])


def _shards(entries: list[Entry]) -> Iterator[list[Entry]]:
    shard: list[Entry] = []
    for entry in entries:
        if _bytes([*shard, entry]) > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(entry)
    yield shard


def _bytes(entries: list[Entry]) -> int:
    return sum(2 * _size(shape) for _, _, shape in entries)


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


if __name__ == "__main__":
    main()
