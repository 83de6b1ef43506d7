"""Damaged checkpoints, guided by coverage: everything that is read must be understood or refused.

    pip install atheris
    python scripts/fuzz.py [-runs=200000] [-max_len=4096] [other options of libFuzzer]

Each run damages one file of a small checkpoint (a shard's header, the index, config.json,
normconvert.json) or a recipe, and opens it. Anything but a sentence of ours is a crash, and so is a
file that appears beside. A run of more than 10 s, or more than 1 GiB, counts as one too.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["normconvert"]):
    from normconvert.errors import NormconvertError
    from normconvert.ir.native import Native, native_of
    from normconvert.recipe import read_recipe
    from normconvert.source import open_checkpoint
    from normconvert.source.header import read_header
    from normconvert.verify import stored_options

SHARD = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"
HEADER = json.dumps(
    {
        "a.weight": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
        "__metadata__": {"format": "pt"},
    }
).encode()
FILES = {
    "config.json": json.dumps(
        {
            "model_type": "normconvert",
            "architectures": ["LlamaForCausalLM"],
            "quantization_config": None,
            "normconvert": {"stock": "llama", **Native().to_json()},
        }
    ).encode(),
    INDEX: json.dumps({"metadata": {}, "weight_map": {"a.weight": SHARD, "b": SHARD}}).encode(),
    SHARD: len(HEADER).to_bytes(8, "little") + HEADER + bytes(16),
    "normconvert.json": b'{"normconvert": "0", "options": {"rewrites": ["flashnorm"]}}',
    "recipe.yaml": b"steps: [rmsnorm, flashnorm]\nformat: native\n",
}
OPTIONS = ["-timeout=10", "-rss_limit_mb=1024", "-max_len=600", "-len_control=0"]


def main() -> None:
    place = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    folder, corpus = place / "model", place / "corpus"
    folder.mkdir()
    corpus.mkdir()
    for i, (name, content) in enumerate(FILES.items()):
        (folder / name).write_bytes(content)
        (corpus / name).write_bytes(bytes([i]) + content)
    # Each reader alone: an input is kept for the lines of code that it is the first to reach.
    checkpoint = open_checkpoint(str(folder))
    readers: dict[str, Callable[[], object]] = {
        "config.json": lambda: read_config(folder),
        INDEX: lambda: open_checkpoint(str(folder)),
        SHARD: lambda: read_header(folder / SHARD),
        "normconvert.json": lambda: stored_options(checkpoint),
        "recipe.yaml": lambda: read_recipe(folder / "recipe.yaml"),
    }

    def run(data: bytes) -> None:
        if not data:
            return
        name = list(FILES)[data[0] % len(FILES)]
        (folder / name).write_bytes(data[1:])
        try:
            readers[name]()
        except NormconvertError as error:
            if "\n" in str(error):
                raise AssertionError(f"more than one line: {error}") from error
        finally:
            (folder / name).write_bytes(FILES[name])
            assert sorted(os.listdir(folder)) == sorted(FILES), os.listdir(folder)
            assert sorted(os.listdir(place)) == ["corpus", "model"], os.listdir(place)

    atheris.Setup([sys.argv[0], *OPTIONS, *sys.argv[1:], str(corpus)], run)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(place, ignore_errors=True)


def read_config(folder: Path) -> None:
    try:
        native_of(open_checkpoint(str(folder)).config)
    except ValueError as error:  # of ours, for the callers to complete
        if "is not understood" not in str(error):
            raise


if __name__ == "__main__":
    main()
