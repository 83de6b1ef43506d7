"""Several processes, started by `accelerate launch`: the same bytes, one voice, one exit status."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import normconvert
from command_line import Run, assert_sentence, environment, run_here
from normconvert.processes import ALONE, Processes, launched
from normconvert.rewrite.layout import Layout, divide
from normconvert.source import Header, Shard

MODELS = Path(__file__).parents[1] / "models"
DYING = Path(__file__).parent / "dying_process.py"
# --multi_gpu is accelerate's word for several processes on one machine; on CPUs gloo connects them.
LAUNCH = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--mixed_precision", "no",
    "--dynamo_backend", "no",
)  # fmt: skip


def launch(
    count: int,
    *arguments: str | Path,
    cwd: Path,
    script: tuple[str | Path, ...] = ("-m", "normconvert"),
    env: Mapping[str, str] | None = None,
) -> Run:
    """normconvert in `count` processes; its own lines on stderr only, not those of accelerate."""
    processes = ("--num_machines", "1", "--main_process_port", "0", "--num_processes", str(count))
    command = [sys.executable, *LAUNCH, *processes, *map(str, (*script, *arguments))]
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(**(env or {})),
        capture_output=True,
        text=True,
        timeout=240,
    )
    return Run(done.returncode, done.stdout, own_lines(done.stderr))


def own_lines(err: str) -> str:
    return "".join(line for line in err.splitlines(True) if line.startswith("normconvert: "))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-llama in six shards, and beside it what one process makes of it."""
    folder = Path(shutil.copytree(MODELS / "tiny-llama", tmp_path_factory.mktemp("six") / "model"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {f"model-{i + 1:05}-of-00006.safetensors": sorted(tensors)[i::6] for i in range(6)}
    for shard, held in names.items():
        save_file({name: tensors[name] for name in held}, folder / shard, {"format": "pt"})
    weight_map = {name: shard for shard, held in names.items() for name in held}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    normconvert.convert(folder, folder.parent / "alone", verify=False)
    return folder


def assert_same(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert sorted(path.name for path in other.iterdir()) == names
    assert filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


def test_four_processes_write_what_one_does(sharded: Path, tmp_path: Path) -> None:
    result = launch(4, "flashnorm", sharded, "-o", "output", "--no-verify", "--json", cwd=tmp_path)
    assert (result.status, result.err) == (0, "")
    assert result.json()["status"] == "converted"  # one document, although four processes ran
    assert_same(tmp_path / "output", sharded.parent / "alone")
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_dies_ends_the_run(rank: str, sharded: Path, tmp_path: Path) -> None:
    arguments = ("flashnorm", sharded, "-o", "output", "--no-verify")
    env = {"RANK_THAT_DIES": rank}
    result = launch(2, *arguments, cwd=tmp_path, script=(DYING,), env=env)
    assert result.status == 1  # accelerate's own, whatever the processes' were
    assert result.out == ""
    assert_sentence(result.err.removeprefix("normconvert: ").rstrip("\n"), "one of the 2 processes")
    (staged,) = tmp_path.iterdir()
    assert staged.name.startswith(".output.normconvert-")
    before = {path.name: path.stat().st_ino for path in staged.glob("*.safetensors")}
    assert before
    if rank == "0":
        return
    assert launch(2, *arguments, "--resume", cwd=tmp_path).status == 0
    output = tmp_path / "output"
    assert before.items() <= {path.name: path.stat().st_ino for path in output.iterdir()}.items()
    assert_same(output, sharded.parent / "alone")
    assert list(tmp_path.iterdir()) == [output]


def test_what_is_refused_is_refused_once(sharded: Path, tmp_path: Path) -> None:
    result = launch(2, "flashnorm", "nowhere", cwd=tmp_path)
    assert result.status == 1
    assert_sentence(result.err.removeprefix("normconvert: ").rstrip("\n"), "nowhere")
    assert list(tmp_path.iterdir()) == []
