"""The cost that `inspect` foretells, held against what is read and written."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import zoo
from command_line import run_here
from normconvert.api import inspect
from normconvert.cost import estimate
from normconvert.ir.event import ignore
from normconvert.planner import REWRITES, make_plan
from normconvert.rewrite import write
from normconvert.source import open_checkpoint
from normconvert.trace import trace

MODELS = Path(__file__).parents[1] / "models"


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes by the system call that moves them."""
    moved: Counter[str] = Counter()

    def count(name: str) -> None:
        call = getattr(os, name)

        def counting(*arguments: Any) -> Any:
            result = call(*arguments)
            moved[name] += len(result) if isinstance(result, bytes) else result
            return result

        monkeypatch.setattr(os, name, counting)

    for name in ("pread", "preadv", "pwrite", "copy_file_range"):
        count(name)
    return moved


@pytest.mark.parametrize(
    ("model", "rewrite"),
    [
        ("tiny-llama", "flashnorm"),
        ("tiny-gpt2", "flashnorm"),
        ("tiny-gpt2", "crmsnorm"),
        ("gpt_neox", "rmsnorm"),  # whose writers' means are those of all rows
    ],
)
def test_what_is_read_and_written(
    model: str, rewrite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = MODELS / model, tmp_path / "output"
    if model in zoo.ZOO:
        folder = tmp_path / model
        zoo.save(model, folder, dtype="float32")
    checkpoint = open_checkpoint(str(folder))
    output.mkdir()
    graph = trace(checkpoint)
    plan = make_plan(
        graph,
        checkpoint,
        REWRITES[rewrite],
        format="stock" if rewrite == "flashnorm" else "native",
    )
    cost = estimate(plan, checkpoint)
    moved = counted(monkeypatch)
    write(plan, checkpoint, output, {}, ignore)
    copied = moved["copy_file_range"]
    assert moved["pread"] + moved["preadv"] + copied == pytest.approx(cost.read_bytes, rel=0.02)
    assert moved["pwrite"] + copied == pytest.approx(cost.written_bytes, rel=0.02)
    written = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    assert moved["pwrite"] + copied == written  # nothing went past the count


def test_it_writes_in_pieces_for_which_no_room_must_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux keeps a long piece in one run of pages, and moves others out of the way for that."""
    pieces: list[tuple[int, int]] = []
    pwrite = os.pwrite

    def noted(file: int, data: memoryview, offset: int) -> int:
        pieces.append((offset, offset + len(data)))
        return pwrite(file, data, offset)

    checkpoint = open_checkpoint(str(MODELS / "tiny-llama"))
    plan = make_plan(trace(checkpoint), checkpoint, ("flashnorm",))
    (tmp_path / "output").mkdir()
    monkeypatch.setattr(os, "pwrite", noted)
    write(plan, checkpoint, tmp_path / "output", {}, ignore)
    assert len(pieces) > 10
    assert all(start // 2**16 == (stop - 1) // 2**16 for start, stop in pieces)


def test_the_disk_speed(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path / "llama", dtype="float32")
    slow, fast = (
        run_here("inspect", "llama", "--json", "--disk-speed", speed, cwd=tmp_path).json()["cost"]
        for speed in ("1kB/s", "2 KiB/s")
    )
    assert (slow["disk_speed"], fast["disk_speed"]) == (1000, 2048)
    moved = slow["read_bytes"] + slow["written_bytes"]
    assert slow["seconds"] - fast["seconds"] == pytest.approx(moved / 1000 - moved / 2048)
    assert inspect(tmp_path / "llama", disk_speed=1000).cost.seconds == slow["seconds"]


def test_the_start_of_the_program_is_said_to_be_most_of_it(tmp_path: Path) -> None:
    fast, slow = (
        run_here("inspect", MODELS / "tiny-llama", "--disk-speed", speed, cwd=tmp_path).out
        for speed in ("500MB/s", "1kB/s")
    )
    assert (
        "on a disk of 500 MB/s (--disk-speed) that is about 5 s, most of it the start of the "
        "program, without the verification.\n"
    ) in fast
    assert "on a disk of 1 kB/s (--disk-speed) that is about 30 min 53 s, without" in slow


@pytest.mark.parametrize("command", ["flashnorm", "rmsnorm", "crmsnorm"])
def test_a_dry_run_tells_the_cost(command: str, tmp_path: Path) -> None:
    planned = run_here(command, MODELS / "tiny-gpt2", "--dry-run", cwd=tmp_path)
    lines = planned.out.splitlines()
    (cost,) = (line for line in lines if "(inspect --disk-speed) that is about 5 s" in line)
    assert cost.startswith("Folding would" if command == "flashnorm" else "Converting would")
    assert lines[-1] == "Dry run: nothing was written."
    assert command == "flashnorm" or lines[0].startswith("Planned: made ")


@pytest.mark.parametrize("speed", ["fast", "0MB/s", "-1MB/s", "500 parsecs", ""])
def test_what_is_no_speed(speed: str, tmp_path: Path) -> None:
    result = run_here("inspect", "nowhere", f"--disk-speed={speed}", cwd=tmp_path)
    assert result.status == 2
    assert "is no speed" in result.err
