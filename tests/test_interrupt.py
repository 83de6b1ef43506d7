"""Ctrl-C, SIGTERM and SIGKILL at any moment: the output is absent, or the old one, or the new."""

from __future__ import annotations

import filecmp
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from command_line import COMMAND, assert_sentence, environment, listing
from normconvert.rewrite.folder import stage

LEFTOVER = r"\.output\.normconvert-\d+-[0-9a-f]+(-old)?"
SIZES = {
    "vocab_size": 8000, "hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 2,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 233 MB: long enough to be interrupted."""
    folder = tmp_path_factory.mktemp("large") / "model"
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({**config, **SIZES}))
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    names = {
        "embed_tokens": (8000, 2048), "norm": (2048,),
        **{
            f"layers.{layer}.{name}": shape
            for layer in range(2)
            for name, shape in {
                **{f"self_attn.{letter}_proj": (2048, 2048) for letter in "qkvo"},
                **{f"mlp.{name}_proj": (4096, 2048) for name in ("gate", "up")},
                "mlp.down_proj": (2048, 4096),
                "input_layernorm": (2048,), "post_attention_layernorm": (2048,),
            }.items()
        },
    }  # fmt: skip
    tensors = {f"model.{name}.weight": fill(block, *shape) for name, shape in names.items()}
    tensors["lm_head.weight"] = fill(block, 8000, 2048)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def fill(block: torch.Tensor, *shape: int) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return block.repeat(-(-count // len(block)))[:count].reshape(shape)


# Imports once, then runs every other line of its input as a command in a fork of itself. It waits
# for the fork when the next line asks it to: until then the process keeps its number, ended or not.
SERVER = """
import json, os, sys
import normconvert.planner, normconvert.rewrite, normconvert.trace
from normconvert.cli.main import main
for line in sys.stdin:
    sys.argv[1:] = json.loads(line)
    process = os.fork()
    if process == 0:
        for number in (1, 2):
            os.dup2(os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        status = 70
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(process, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


@dataclass
class Bench:
    """A folder with the model in it, and a process that converts it again and again."""

    folder: Path
    server: subprocess.Popen[str]
    seconds: float = 0.0
    """How long a whole conversion takes."""

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def start(self, *options: str, model: str = "model") -> int:
        """Start a conversion into `output`; its process, as soon as it minds signals."""
        arguments = ["flashnorm", model, "-o", "output", "--no-verify", *options]
        (self.folder / "said").write_text("")
        process = self._ask(json.dumps(arguments))
        while not catches(process, signal.SIGTERM):
            time.sleep(0.001)
        return process

    def finish(self) -> tuple[int, str]:
        """The exit status of the conversion, and what it said."""
        return self._ask(""), (self.folder / "said").read_text()

    def _ask(self, line: str) -> int:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(line + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def leftovers(self) -> list[str]:
        names = {path.name for path in self.folder.iterdir() if not path.name.startswith("whole")}
        return sorted(names - {"model", "sharded", "output", "said"})


@pytest.fixture(scope="module")
def bench(model: Path) -> Iterator[Bench]:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=model.parent,
        env=environment(),
    )
    bench = Bench(model.parent, server)
    try:
        for _ in range(2):  # the second shows how long one takes when everything is warm
            shutil.rmtree(bench.output, ignore_errors=True)
            started = time.monotonic()
            bench.start()
            assert bench.finish()[0] == 0
            bench.seconds = time.monotonic() - started
        bench.output.rename(bench.folder / "whole")
        yield bench
    finally:
        assert server.stdin is not None
        server.stdin.close()
        assert server.wait(60) == 0
        assert server.stdout is not None
        server.stdout.close()


def catches(process: int, number: int) -> bool:
    """Whether the process has a handler for a signal, or has ended."""
    status = Path(f"/proc/{process}/status").read_text()
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    assert caught is not None
    return bool(int(caught[1], 16) >> (number - 1) & 1) or "State:\tZ" in status


def put_older(folder: Path) -> None:
    folder.mkdir()
    (folder / "normconvert.json").write_text('{"files": ["old"]}')
    (folder / "old").write_text("")


def state(folder: Path, whole: Path) -> str:
    if not folder.exists():
        return "absent"
    names = sorted(path.name for path in folder.iterdir())
    if names == ["normconvert.json", "old"]:
        return "old"
    assert names == sorted(path.name for path in whole.iterdir())
    same, other, unreadable = filecmp.cmpfiles(folder, whole, names, shallow=False)
    assert (sorted(same), other, unreadable) == (names, [], [])
    return "new"


@pytest.mark.parametrize("force", [False, True], ids=["first", "force"])
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_at_any_moment(number: str, force: bool, bench: Bench) -> None:
    # While it traces, twice while it writes, and when it is about to end.
    for low, high in ((0.0, 0.3), (0.3, 0.7), (0.5, 0.9), (0.9, 1.1)):
        shutil.rmtree(bench.output, ignore_errors=True)
        if force:
            put_older(bench.output)
        process = bench.start(*(["--force"] if force else []))
        time.sleep(random.uniform(low, high) * bench.seconds)
        os.kill(process, signal.Signals[number])
        status, said = bench.finish()
        found = state(bench.output, bench.folder / "whole")
        may_be = {"new", "old" if force else "absent"}
        if number == "SIGKILL":
            may_be.add("absent")  # the kernel knows no way to replace a folder in one step
        assert found in may_be
        if number == "SIGKILL":
            assert status in (-signal.SIGKILL, 0)
            assert all(re.fullmatch(LEFTOVER, name) for name in bench.leftovers())
            continue
        assert bench.leftovers() == []
        assert status in (0, 2), said
        if status == 2:
            assert_sentence(said.rstrip("\n").removeprefix("normconvert: "), "Interrupted")
        else:
            assert found == "new"
    if number == "SIGKILL":  # and the next run clears up
        shutil.rmtree(bench.output, ignore_errors=True)
        bench.start("--force")
        assert bench.finish()[0] == 0
        assert state(bench.output, bench.folder / "whole") == "new"
        assert bench.leftovers() == []


@pytest.fixture(scope="module")
def sharded(bench: Bench) -> Path:
    """The model in eight shards."""
    folder = bench.folder / "sharded"
    folder.mkdir()
    shutil.copy(bench.folder / "model" / "config.json", folder)
    tensors = load_file(bench.folder / "model" / "model.safetensors")
    names = {f"model-{i + 1:05}-of-00008.safetensors": sorted(tensors)[i::8] for i in range(8)}
    for shard, held in names.items():
        save_file({name: tensors[name] for name in held}, folder / shard, {"format": "pt"})
    weight_map = {name: shard for shard, held in names.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    )
    return folder


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """The shards that have their names in a folder that is being built, with inode and time."""
    shards = folder.glob(".output.normconvert-*/model-*.safetensors")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards}


def broken_off(bench: Bench, number: str, *options: str) -> dict[str, tuple[int, int]]:
    """Break a conversion off when some shards are complete; these shards."""
    process = bench.start(*options, model="sharded")
    while len(written(bench.folder)) < 3:
        time.sleep(0.0005)
    os.kill(process, signal.Signals[number])
    bench.finish()
    assert not bench.output.exists()
    return written(bench.folder)


def in_output(bench: Bench) -> dict[str, tuple[int, int]]:
    shards = bench.output.glob("model-*.safetensors")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards}


@pytest.mark.usefixtures("sharded")
@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM"])
def test_resume(number: str, bench: Bench) -> None:
    whole = bench.folder / "whole-resumed"
    shutil.rmtree(bench.output, ignore_errors=True)
    if not whole.exists():
        bench.start(model="sharded")
        assert bench.finish()[0] == 0
        bench.output.rename(whole)
    before = broken_off(bench, number, "--resume")
    assert 3 <= len(before) < 8
    for torn in bench.folder.glob(".output.normconvert-*/*.partial"):
        torn.write_bytes(b"torn")
    bench.start("--resume", model="sharded")
    status, out = bench.finish()
    assert status == 0
    assert f"Resumed: {len(before)} shards of an earlier run stayed." in out.splitlines()
    assert before.items() <= in_output(bench).items()
    assert state(bench.output, whole) == "new"
    assert bench.leftovers() == []


@pytest.mark.parametrize("change", ["nothing", "options", "source", "a shard"])
def test_what_is_not_resumed(change: str, bench: Bench, sharded: Path) -> None:
    """Without the option; or with others, or if the source or the shard has changed since."""
    shutil.rmtree(bench.output, ignore_errors=True)
    before = broken_off(bench, "SIGKILL")
    name = min(before)
    if change == "source":
        os.utime(sharded / name)
    if change == "a shard":
        (path,) = bench.folder.glob(f".output.normconvert-*/{name}")
        path.write_bytes(b"torn")
    options = {"nothing": [], "options": ["--resume", "--dtype", "float32"]}
    bench.start(*options.get(change, ["--resume"]), model="sharded")
    assert bench.finish()[0] == 0
    assert in_output(bench)[name] != before[name]
    if change != "a shard":
        assert before.items().isdisjoint(in_output(bench).items())
    assert bench.leftovers() == []


LAYOUTS: Mapping[str, tuple[str, list[str]]] = {
    "stock": ("model", []),
    "native": ("model", ["--format", "native"]),
    "sharded": ("sharded", []),
}


@pytest.mark.usefixtures("sharded")
@pytest.mark.timeout(3600)
def test_many_kills(bench: Bench) -> None:
    """Over every layout, over nothing or an older output, resumed or anew."""
    wholes = {}
    for name, (model, options) in LAYOUTS.items():
        shutil.rmtree(bench.output, ignore_errors=True)
        bench.start(*options, model=model)
        assert bench.finish()[0] == 0
        wholes[name] = bench.output.rename(bench.folder / f"whole-{name}")
    for i in range(int(os.environ.get("KILLS", "6"))):
        name = random.choice([*LAYOUTS])
        model, options = LAYOUTS[name]
        force, resume = random.random() < 0.5, random.random() < 0.5
        shutil.rmtree(bench.output, ignore_errors=True)
        if force:
            put_older(bench.output)
        given = [*options, *(["--force"] if force else []), *(["--resume"] if resume else [])]
        process = bench.start(*given, model=model)
        time.sleep(random.uniform(0, 1.1) * bench.seconds)
        os.kill(process, signal.SIGKILL)
        bench.finish()
        may_be = ("absent", "new", "old") if force else ("absent", "new")
        assert state(bench.output, wholes[name]) in may_be, (i, given)
        assert all(re.fullmatch(LEFTOVER, each) for each in bench.leftovers()), (i, given)
    shutil.rmtree(bench.output, ignore_errors=True)
    bench.start("--resume", model="sharded")
    assert bench.finish()[0] == 0
    assert state(bench.output, wholes["sharded"]) == "new"
    assert bench.leftovers() == []


def test_a_whole_process(model: Path, tmp_path: Path) -> None:
    """From Python's start to its end, interrupted as soon as it writes, by an impatient user."""
    arguments = ["flashnorm", str(model), "-o", "output", "--no-verify"]
    with subprocess.Popen(
        [*COMMAND, *arguments], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        while not list(tmp_path.glob(".output.normconvert-*/*.partial")):
            assert process.poll() is None
            time.sleep(0.001)
        for _ in range(5):
            process.send_signal(signal.SIGINT)
            time.sleep(0.002)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert_sentence(said.rstrip("\n").removeprefix("normconvert: "), "Interrupted")
    assert list(tmp_path.iterdir()) == []


# --- the folder itself


@pytest.fixture
def dead() -> int:
    """The number of a process that is no more."""
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


def make(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text(path.name)
    (path / "normconvert.json").write_text('{"files": ["config.json"]}')
    return path


def test_leftovers_are_removed_or_put_back(dead: int, tmp_path: Path) -> None:
    make(tmp_path / f".output.normconvert-{dead}-0123abcd")
    make(tmp_path / f".output.normconvert-{os.getpid()}-0123abcd")  # as in every container
    make(tmp_path / f".output.normconvert-{dead}-456789ab-old")
    kept = {
        make(tmp_path / name).name
        for name in (
            f".output.normconvert-{os.getppid()}-0123abcd",
            f".other.normconvert-{dead}-0123abcd",
            f".output.normconvert-{dead}",
            ".output.normconvert",
            "output.normconvert-1-0",
        )
    }
    with stage(tmp_path / "output", force=True) as staged:
        assert {path.name for path in tmp_path.iterdir()} == {*kept, "output", staged.path.name}
        assert (tmp_path / "output" / "config.json").read_text().endswith("-old")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "output"}
    make(tmp_path / f".output.normconvert-{dead}-456789ab-old")
    with stage(tmp_path / "output", force=True) as staged:
        (staged.path / "config.json").write_text("new")
        staged.commit()
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "output"}
    assert (tmp_path / "output" / "config.json").read_text() == "new"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own answer to Ctrl-C: a shell starts what runs in the background without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("renames", [1, 2])
def test_the_last_step_is_not_interrupted(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between the two renames would leave no output at all."""
    make(tmp_path / "output")
    rename, calls = Path.rename, 0

    def interrupted(path: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == renames:
            signal.raise_signal(signal.SIGINT)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with stage(tmp_path / "output", force=True) as staged:
        (staged.path / "config.json").write_text("new")
        with pytest.raises(KeyboardInterrupt):
            staged.commit()
    assert set(listing(tmp_path)) == {"output", "output/config.json"}
    assert (tmp_path / "output" / "config.json").read_text() == "new"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    make(tmp_path / "place")
    (tmp_path / "output").symlink_to("place")
    with stage(tmp_path / "output", force=True) as staged:
        (staged.path / "config.json").write_text("new")
        staged.commit()
    assert (tmp_path / "output").is_symlink()
    assert (tmp_path / "place" / "config.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "place"]


WITHIN_THE_FAKE_MODE = """
import signal, time, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from normconvert.cli import main

@torch.library.custom_op("tests::interrupted", mutates_args=())
def interrupted(x: torch.Tensor) -> torch.Tensor:
    return x.clone()

@interrupted.register_fake
def _(x):
    signal.raise_signal(signal.SIGTERM)
    print("not yet")
    return torch.empty_like(x)

signal.signal(signal.SIGTERM, main._interrupt)
try:
    with FakeTensorMode():
        interrupted(torch.ones(3))
    time.sleep(30)
    print("never")
except main.Interrupted:
    print("a moment later")
"""


def test_torch_is_not_interrupted_where_that_would_end_the_process(tmp_path: Path) -> None:
    """One SIGTERM of a hundred during a trace made torch abort, with status -6."""
    command = [sys.executable, "-c", WITHIN_THE_FAKE_MODE]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split("\n") == ["not yet", "a moment later", ""], done.stderr
