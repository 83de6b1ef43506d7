"""Several processes, started by `accelerate launch`: the same bytes, one voice, one exit status."""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import normconvert
from command_line import Run, assert_sentence, environment
from normconvert.ir.event import Listener
from normconvert.ir.report import Certificate, Equivalence
from normconvert.processes import ALONE, Job, Processes, divide, launched

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


def as_json(report: Equivalence) -> Any:
    return json.loads(json.dumps(report.to_json()))


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


def test_verifying_gives_one_answer(sharded: Path, tmp_path: Path) -> None:
    alone = sharded.parent / "alone"
    arguments = ("verify-equivalence", sharded, alone, "--device-map", "auto", "--json", "-")
    result = launch(2, *arguments, cwd=tmp_path)
    assert (result.status, result.err) == (0, "")
    assert result.json()["equivalent"]
    found = normconvert.verify_equivalence(sharded, alone)
    assert result.json()["certificate"] == as_json(found)["certificate"]


def test_every_process_certifies_a_part(sharded: Path, tmp_path: Path) -> None:
    """A fault is found in whichever shard it is, so in whichever process reads that."""
    wrong = Path(shutil.copytree(sharded.parent / "alone", tmp_path / "wrong"))
    moved = []
    for shard in sorted(wrong.glob("*.safetensors")):
        tensors = load_file(shard)
        name = min(tensors)
        tensors[name].view(-1)[0] += 1
        moved.append(name)
        save_file(tensors, shard, {"format": "pt"})
    arguments = ("verify-equivalence", sharded, wrong, "--json", "-")
    found = launch(2, *arguments, cwd=tmp_path).json()["certificate"]
    assert found["problem_count"] == 6
    assert sorted(each["place"] for each in found["problems"]) == sorted(moved)
    parts: list[Certificate] = []

    class BothInTurn(Processes):
        def share(self, job: Job, listen: Listener) -> list[Any]:
            parts.extend(job(rank, 2, listen) for rank in range(2))
            return parts

    processes = BothInTurn(rank=0, count=2)
    report = normconvert.verify_equivalence(sharded, wrong, processes=processes)
    assert as_json(report)["certificate"] == found
    assert [part.problem_count for part in parts] == [3, 3]
    assert all(part.rewritten + part.copied > 10 for part in parts)


def test_other_disks_are_refused(sharded: Path, tmp_path: Path) -> None:
    """The same paths, which lead to other files on another machine: one weight, or all of them."""
    script = tmp_path / "on_its_disk.py"
    script.write_text(
        f"import os\nos.chdir({str(tmp_path)!r} + '/disk' + os.environ['RANK'])\n"
        "from normconvert.cli.main import main\nmain()\n"
    )
    for rank in range(2):
        shutil.copytree(sharded, tmp_path / f"disk{rank}/model")
        shutil.copytree(sharded.parent / "alone", tmp_path / f"disk{rank}/alone")
    before = sorted(tmp_path.rglob("*"))
    for arguments in (
        ("verify-equivalence", "model", "alone"),
        ("flashnorm", "model", "-o", tmp_path / "output", "--no-verify"),
    ):
        result = launch(2, *arguments, cwd=tmp_path, script=(script,))
        assert result.status == 1
        sentence = result.err.removeprefix("normconvert: ").rstrip("\n")
        assert_sentence(sentence, "sees another", "than the first process", "share")
        assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them; their names are those of its ends too."""
    mark = f"{os.getpid() % 100_000}"
    names = f"nca{mark}", f"ncb{mark}"
    steps = [
        *(("netns", "add", name) for name in names),
        ("link", "add", names[0], "netns", names[0], "type", "veth",
         "peer", "name", names[1], "netns", names[1]),
    ]  # fmt: skip
    for i, name in enumerate(names):
        steps += [
            ("-n", name, "addr", "add", f"10.211.0.{i + 1}/24", "dev", name),
            ("-n", name, "link", "set", "lo", "up"),
            ("-n", name, "link", "set", name, "up"),
        ]
    try:
        for step in steps:
            subprocess.run(["ip", *step], check=True, capture_output=True, text=True)
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        pytest.skip(f"no network namespaces here: {said.strip()}")
    finally:
        for name in names:
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def launch_on(
    hosts: tuple[str, str], *arguments: str | Path, cwd: Path, hidden: Path | None = None
) -> list[Run]:
    """One process on each host. The second sees an empty folder in place of `hidden`."""
    started = []
    for rank, host in enumerate(hosts):
        script = ["set -e", f"mount -t tmpfs none {hidden}"] if hidden and rank else []
        there = ["ip", "netns", "exec", host, "unshare", "-m", "sh", "-c"]
        started.append(
            subprocess.Popen(
                [
                    *there, "\n".join([*script, 'exec "$@"']), "sh", sys.executable, *LAUNCH,
                    *("--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)),
                    *("--main_process_ip", "10.211.0.1", "--main_process_port", "29511"),
                    *("-m", "normconvert", *map(str, arguments)),
                ],
                cwd=cwd,
                env=environment(GLOO_SOCKET_IFNAME=host),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )  # fmt: skip
    said = [process.communicate(timeout=240) for process in started]
    return [
        Run(process.returncode, out, own_lines(err))
        for process, (out, err) in zip(started, said, strict=True)
    ]


def test_two_hosts_with_a_file_system_in_common(
    hosts: tuple[str, str], sharded: Path, tmp_path: Path
) -> None:
    arguments = ("flashnorm", sharded, "-o", tmp_path / "output", "--no-verify")
    first, second = launch_on(hosts, *arguments, cwd=tmp_path)
    assert (first.status, first.err) == (0, "")
    assert second == Run(0, "", "")
    assert_same(tmp_path / "output", sharded.parent / "alone")


def test_two_hosts_without_one(hosts: tuple[str, str], sharded: Path, tmp_path: Path) -> None:
    """An error of another process than the first, and the first says so."""
    place = tmp_path / "place"
    place.mkdir()
    arguments = ("flashnorm", sharded, "-o", place / "output", "--no-verify")
    first, second = launch_on(hosts, *arguments, cwd=tmp_path, hidden=place)
    assert_sentence(first.err.removeprefix("normconvert: ").rstrip("\n"), "sees another", "share")
    assert second == Run(1, "", "")
    assert first.status == 1
    assert list(place.iterdir()) == []


# --- without any process


def test_shards_are_divided_by_bytes() -> None:
    """Not by count: the greedy rule is at most a third above the best division."""
    parts = divide((1, 1, 1, 1, 9, 5, 4), 3, lambda size: size)
    assert [sum(part) for part in parts] == [9, 7, 6]
    assert sorted(size for part in parts for size in part) == [1, 1, 1, 1, 4, 5, 9]
    assert divide((3,), 3, lambda size: size)[1:] == ((), ())  # fewer shards than processes


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, ALONE),
        ({"WORLD_SIZE": "1", "RANK": "0"}, ALONE),
        ({"WORLD_SIZE": "4"}, ALONE),
        ({"WORLD_SIZE": "4", "RANK": "3"}, Processes(rank=3, count=4)),
    ],
)
def test_the_environment_says_how_many(
    variables: dict[str, str], found: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched() == found
