"""By Hub id, against a server on this machine; see hub_server.py."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import normconvert
import zoo
from command_line import (
    COMMAND,
    Run,
    assert_sentence,
    environment,
    listing,
    nothing_written,
    run,
    run_here,
)
from hub_server import Hub, Repository, serve
from normconvert.ir.event import ignore
from normconvert.source.hub import needed_files
from test_cli import OWN_CODE

MODEL = "someone/tiny-llama"
NEEDED = {
    "LICENSE", "README.md", "chat_template.jinja", "config.json", "generation_config.json",
    "merges.txt", "model.safetensors.index.json", "modeling_tiny.py", "special_tokens_map.json",
    "tokenizer.json", "tokenizer.model", "vocab.txt", ".gitattributes",
}  # fmt: skip
NOT_NEEDED = {
    "consolidated.safetensors", "flax_model.msgpack", "model.gguf", "onnx/model.onnx",
    "onnx/model.onnx_data", "original/consolidated.00.pth", "optimizer.pt", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "rust_model.ot", "tf_model.h5", "fp16/model.safetensors",
    "adapter_model.safetensors",
}  # fmt: skip


@dataclass(frozen=True)
class Internet:
    """The Hub, a user's cache and the user's folder."""

    hub: Hub
    home: Path
    here: Path

    def environment(self, **variables: str) -> dict[str, str]:
        """This Hub and this cache."""
        online = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "HF_HUB_OFFLINE": "0"}
        env = environment()
        env.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)  # there is no terminal: none without asking
        return {**env, **online, **variables}

    def run(self, *arguments: str, **variables: str) -> Run:
        """The command."""
        return run(*arguments, cwd=self.here, env=self.environment(**variables))

    def opened(self, model: str, *revision: str) -> str:
        """The commit of the checkpoint that the first stage opens, without the stages after it."""
        code = """import sys
from normconvert.source import download, open_checkpoint
checkpoint = open_checkpoint(sys.argv[1], revision=(sys.argv[2:] or [None])[0])
download(checkpoint)
print(checkpoint.commit)"""
        command = [sys.executable, "-c", code, model, *revision]
        env = self.environment(HF_HUB_DISABLE_PROGRESS_BARS="1")
        done = subprocess.run(command, env=env, check=True, text=True, stdout=subprocess.PIPE)
        return done.stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A sharded Llama on two branches, with all that repositories keep beside one."""
    folder = tmp_path_factory.mktemp("repository")
    for seed, branch in enumerate(("main", "fix/gains")):
        place = folder / str(seed)
        zoo.save("llama", place, dtype="bfloat16", max_shard_size="80KB", seed=seed)
        for name in (NEEDED | NOT_NEEDED) - {path.name for path in place.iterdir()}:
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_text(f"not read: {name} of {branch}")
    branches = {"main": folder / "0", "fix/gains": folder / "1"}
    return Repository(branches=branches)


@pytest.fixture(scope="module")
def internet(
    repository: Repository, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Internet]:
    folder = tmp_path_factory.mktemp("user")
    (folder / "here").mkdir()
    gated = Repository(branches=repository.branches, gated=True)
    with serve() as hub:
        hub.repositories |= {MODEL: repository, "someone/gated": gated}
        yield Internet(hub, folder / "home", folder / "here")


@pytest.fixture(scope="module")
def branch(internet: Internet) -> Run:
    """A branch, converted; what the others look at."""
    internet.hub.log.clear()
    return internet.run("flashnorm", MODEL, "--revision", "fix/gains", "--no-verify")


@pytest.fixture
def output(internet: Internet, branch: Run) -> Path:
    assert branch.status == 0, branch
    return internet.here / "tiny-llama-flashnorm"


def commit(repository: Repository, revision: str) -> str:
    found = repository.resolve(revision)
    assert found is not None
    return found[0]


def test_a_branch_is_converted(branch: Run, output: Path, repository: Repository) -> None:
    assert branch.err == ""
    manifest = json.loads((output / "normconvert.json").read_text())
    assert manifest["source"] == {"model": MODEL, "commit": commit(repository, "fix/gains")}
    ids = torch.arange(5, 19).reshape(2, 7)
    expected = zoo.logits(repository.branches["fix/gains"], ids, dtype="float32")
    other = zoo.logits(repository.branches["main"], ids, dtype="float32")
    found = zoo.logits(output, ids, dtype="float32")
    assert (found - expected).norm() < 0.05 * expected.norm() < (other - expected).norm()


def test_only_what_is_needed_is_downloaded(
    internet: Internet, output: Path, repository: Repository
) -> None:
    place = repository.branches["fix/gains"]
    shards = {path.name for path in place.glob("model-*.safetensors")}
    assert len(shards) == 3
    assert set(internet.hub.downloads) == NEEDED | shards
    assert len(internet.hub.downloads) == len(NEEDED | shards)
    written = {str(p.relative_to(output)) for p in output.rglob("*") if p.is_file()}
    assert written == NEEDED | shards | {"normconvert.json"}
    assert not any(path.is_symlink() for path in output.rglob("*"))  # into the cache, say
    for name in NEEDED:
        assert (output / name).read_bytes() == (place / name).read_bytes()
    for name in shards:
        assert load_file(output / name).keys() == load_file(place / name).keys()


def test_the_cache_serves_without_the_hub(internet: Internet, output: Path) -> None:
    internet.hub.log.clear()
    arguments = ("flashnorm", MODEL, "--revision", "fix/gains", "--no-verify", "-o", "offline")
    again = internet.run(*arguments, HF_HUB_OFFLINE="1")
    assert again.status == 0, again
    assert internet.hub.log == []
    copy = internet.here / "offline"
    for path in output.iterdir():
        assert (copy / path.name).read_bytes() == path.read_bytes()
    shutil.rmtree(copy)
    with nothing_written(internet.here):
        main = internet.run("inspect", MODEL, HF_HUB_OFFLINE="1")  # which was never fetched
        main.assert_refused(MODEL, "HF_HUB_OFFLINE")


def test_the_original_at_its_revision(internet: Internet, output: Path) -> None:
    arguments = ("verify-equivalence", MODEL, str(output), "--revision", "fix/gains", "--json", "-")
    report = internet.run(*arguments).json()
    assert report["equivalent"] is True
    assert report["certificate"]["problem_count"] == 0


def test_main_by_default_and_a_commit_by_its_hash(
    internet: Internet, output: Path, repository: Repository
) -> None:
    internet.hub.log.clear()
    main, pinned = (commit(repository, branch) for branch in ("main", "fix/gains"))
    assert internet.opened(MODEL, "main") == main
    assert internet.hub.downloads
    internet.hub.log.clear()
    assert internet.opened(MODEL, pinned) == pinned
    assert internet.opened(MODEL) == main
    assert internet.hub.downloads == []  # all of it is in the cache


def test_what_the_hub_refuses(internet: Internet) -> None:
    gated, model = "someone/gated", MODEL
    with nothing_written(internet.here):
        internet.run("flashnorm", "someone/nothing").assert_refused("someone/nothing", "HF_TOKEN")
        internet.run("inspect", gated).assert_refused(gated, "terms", "HF_TOKEN")
        internet.run("inspect", model, "--revision", "x").assert_refused(model, "'x'", "--revision")
        gone = internet.run("inspect", "no/server", "--json", HF_ENDPOINT="http://127.0.0.1:9")
        gone.assert_refused("no/server", "connection", code="source")
        internet.run("verify-equivalence", "a", "no/thing").assert_refused("a", "the Hub")


def test_what_the_hub_answers(internet: Internet) -> None:
    """One process for all statuses; each is the answer to one request."""
    code = """import sys
from normconvert import NormconvertError
from normconvert.source import open_checkpoint
for _ in range(int(sys.argv[1])):
    try:
        open_checkpoint("someone/tiny-llama", extent="config")
    except NormconvertError as error:
        print(error)"""
    answers = {401: "HF_TOKEN", 403: "permission", 429: "minutes", 500: "again later"}
    hub, home = internet.hub, str(internet.here / "answers")
    hub.failures = [(f"/api/models/{MODEL}", status) for status in answers]
    command = [sys.executable, "-c", code, str(len(answers))]
    env = internet.environment(HF_HOME=home, HF_TOKEN="hf_reader")
    done = subprocess.run(command, env=env, check=True, text=True, stdout=subprocess.PIPE)
    for said, words in zip(done.stdout.splitlines(), answers.values(), strict=True):
        assert_sentence(said, MODEL, words)


def test_needed_files() -> None:
    names = sorted(NEEDED | NOT_NEEDED | {"model.safetensors", "model-1-of-61.safetensors"})
    assert set(needed_files(names, "files")) == NEEDED
    plan = {"config.json", "model.safetensors.index.json"}
    assert set(needed_files(names, "config")) == plan
    assert set(needed_files(names, "code")) == {*plan, "modeling_tiny.py"}
    assert normconvert.SourceError.code == "source"


@pytest.fixture(scope="module")
def large(internet: Internet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose weights are larger than what is asked for to read their headers."""
    folder = tmp_path_factory.mktemp("large") / "llama"
    entry = zoo.Entry(
        model_type="llama",
        config={"vocab_size": 5000, "intermediate_size": 5000, "tie_word_embeddings": True},
    )
    with mock.patch.object(zoo, "ZOO", {"large": entry}):
        zoo.save("large", folder, dtype="float32", max_shard_size="1MB")
    (folder / "README.md").write_text("# The original\n")
    internet.hub.repositories["someone/large"] = Repository(branches={"main": folder})
    return folder


def weights_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.safetensors") if path.stat().st_size > 100_000]


def test_inspect_reads_headers_alone(internet: Internet, large: Path) -> None:
    hub, home = internet.hub, str(internet.here / "no weights")
    hub.log.clear()
    hub.sent.clear()
    inspected = internet.run("inspect", "someone/large", "--json", HF_HOME=home)
    assert (inspected.status, inspected.err) == (0, "")
    assert hub.downloads == ["config.json", "model.safetensors.index.json"]
    shards = {path.name: path.stat().st_size for path in large.glob("*.safetensors")}
    assert len(shards) > 3
    assert all(hub.sent[name] < 150_000 for name in shards)
    assert sum(hub.sent[name] for name in shards) < sum(shards.values()) / 4
    assert not weights_in(Path(home))
    # The same as of the folder.
    local = run_here("inspect", large, "--json", cwd=internet.here).json()
    assert {**inspected.json(), "model": 0, "commit": 0} == {**local, "model": 0, "commit": 0}
    # So does a dry run, which looks at the gains' values.
    hub.sent.clear()
    with nothing_written(internet.here / "no weights"):
        arguments = ("someone/large", "--dry-run", "--tied", "untie", "--json")
        planned = internet.run("flashnorm", *arguments, HF_HOME=home)
    assert (planned.status, planned.err) == (0, "")
    assert planned.json()["status"] == "planned"
    assert sum(hub.sent[name] for name in shards) < sum(shards.values()) / 4
    # What is in the cache by now is no whole checkpoint.
    offline = internet.run("flashnorm", "someone/large", HF_HOME=home, HF_HUB_OFFLINE="1")
    offline.assert_refused("someone/large", "cache", "HF_HUB_OFFLINE")


def test_code_is_fetched_when_trusted(internet: Internet, large: Path, tmp_path: Path) -> None:
    own, hub = Path(shutil.copytree(large, tmp_path / "own")), internet.hub
    for name, code in OWN_CODE.items():
        (own / name).write_text(code)
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    names = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, **names}))
    hub.repositories["someone/own"] = Repository(branches={"main": own})
    hub.log.clear()
    arguments = ("inspect", "someone/own", "--trust-remote-code", "--json")
    found = internet.run(*arguments, HF_HOME=str(tmp_path / "home"))
    assert (found.status, found.err) == (0, "")
    norms = {verdict["norm"]: verdict["eps"] for verdict in found.json()["plan"]["verdicts"]}
    assert norms["model.norm"] == pytest.approx(3e-5)
    assert hub.downloads == sorted([*OWN_CODE, "config.json", "model.safetensors.index.json"])


def test_headers_on_the_hub_are_checked_as_others(internet: Internet, large: Path) -> None:
    """One process: each of the repositories has something else wrong with it."""
    hub = internet.hub
    names = sorted(path.name for path in large.glob("*.safetensors"))
    broken = {}
    for fault in ("truncated", "duplicate", "pickle", "absent", "empty"):
        folder = Path(shutil.copytree(large, large.parent / fault))
        broken[fault] = folder
        hub.repositories[f"someone/{fault}"] = Repository(branches={"main": folder})
    data = (large / names[1]).read_bytes()
    (broken["truncated"] / names[1]).write_bytes(data[:-4])
    (broken["duplicate"] / names[1]).write_bytes((large / names[0]).read_bytes())
    (broken["empty"] / names[1]).write_bytes(b"")
    (broken["absent"] / names[1]).unlink()
    for name in (*names, "model.safetensors.index.json"):
        (broken["pickle"] / name).unlink()
    (broken["pickle"] / "pytorch_model.bin").write_bytes(b"")
    private = Repository(branches={"main": large}, private=True)
    hub.repositories |= {"someone/private": private, "someone/mirror": private}
    first = rf"CDN .*{names[2]} bytes=0-131071$"
    hub.failures = [(first, status) for status in (500, 429, 503, -1)]
    hub.failures += [("CDN /someone/mirror", 200)]  # all of the file, whatever was asked for
    code = """import json, sys
from normconvert import NormconvertError
from normconvert.source import open_checkpoint
for name in sys.argv[1:]:
    try:
        found = str(len(open_checkpoint("someone/" + name, extent="config").tensors))
    except NormconvertError as error:
        found = str(error)
    print(name + ": " + found)"""
    home = str(internet.here / "broken")
    env = internet.environment(HF_HOME=home, HF_TOKEN="hf_reader", HF_HUB_DISABLE_PROGRESS_BARS="1")
    command = [sys.executable, "-c", code, *broken, "large", "private", "mirror"]
    done = subprocess.run(command, env=env, check=True, text=True, stdout=subprocess.PIPE)
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert_sentence(said["truncated"], names[1], "someone/truncated", "truncated")
    assert_sentence(said["duplicate"], "stores", "another shard stores too")
    assert_sentence(said["pickle"], "someone/pickle on the Hub", "pytorch_model.bin")
    assert_sentence(said["absent"], names[1], "missing", "--revision")
    assert_sentence(said["empty"], "someone/empty")
    assert said["large"] == said["private"] == str(len(load_all(large)))
    assert_sentence(said["mirror"], "someone/mirror", "parts of files")
    assert hub.failures == []


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.fixture(scope="module")
def whole(large: Path) -> Path:
    """The repository's folder, converted as a folder: what a stream has to give, byte for byte."""
    arguments = ("--tied", "untie", "--no-verify", "-o", "whole")
    assert run_here("flashnorm", large.name, *arguments, cwd=large.parent).status == 0
    return large.parent / "whole"


@pytest.fixture
def user(internet: Internet, tmp_path: Path) -> Internet:
    """Another user of the same Hub, with an empty cache."""
    (tmp_path / "here").mkdir()
    return Internet(internet.hub, tmp_path / "home", tmp_path / "here")


def same_files(folder: Path, other: Path) -> None:
    """All files but the one that tells of the conversion are the same."""
    names, others = (set(listing(each)) for each in (folder, other))
    assert names == others
    for name in names - {"normconvert.json"}:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


@contextmanager
def watched(user: Internet) -> Iterator[dict[str, int]]:
    """The most bytes of the source and of the output that are on the user's disk at a time."""
    most, done = {"source": 0, "output": 0}, threading.Event()

    def look() -> None:
        while not done.wait(0.002):
            found = {"source": 0, "output": 0}
            for folder in (user.home, user.here):
                for root, _, names in os.walk(folder):
                    of_source = folder == user.home or "/source-" in root
                    for name in names:
                        with suppress(OSError):
                            size = Path(root, name).lstat().st_size
                            found["source" if of_source else "output"] += size
            for kind, size in found.items():
                most[kind] = max(most[kind], size)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def test_a_stream_is_the_same_conversion(user: Internet, large: Path, whole: Path) -> None:
    sizes = sorted(path.stat().st_size for path in large.glob("*.safetensors"))
    embeddings = 5000 * 54 * 4  # which the untied head is made of, in another shard
    small = 100_000  # config.json, headers, folders, gains
    with watched(user) as most:
        arguments = ("flashnorm", "someone/large", "--tied", "untie", "--stream")
        done = user.run(*arguments)
    assert (done.status, done.err) == (0, "")
    same_files(user.here / "large-flashnorm", whole)
    assert sizes[-1] < most["source"] <= sizes[-1] + embeddings + small < sum(sizes) / 3
    assert [path.name for path in user.here.iterdir()] == ["large-flashnorm"]
    assert not weights_in(user.home)
    assert "Certificate: " in done.out
    assert "The logits were not compared" in done.out
    assert "quivalent" not in done.out
    manifest = json.loads((user.here / "large-flashnorm" / "normconvert.json").read_text())
    assert manifest["verification"]["comparisons"] == []
    assert manifest["verification"]["certificate"]["problem_count"] == 0
    assert manifest["verification"]["certificate"]["rewritten"] == len(manifest["plan"]["edits"])
    plain = json.loads((whole / "normconvert.json").read_text())
    assert (manifest["plan"], manifest["files"]) == (plain["plan"], plain["files"])


def test_a_stream_onto_the_hub(user: Internet, large: Path, whole: Path) -> None:
    hub = user.hub
    hub.log.clear()
    with watched(user) as most:
        arguments = ("flashnorm", "someone/large", "--tied", "untie", "--stream", "--json")
        push = ("--push", "me/streamed")
        done = user.run(*arguments, *push, HF_TOKEN="hf_writer", HF_HUB_DISABLE_XET="1")
    assert (done.status, done.err) == (0, "")
    assert done.json()["pushed"] == f"{hub.url}/me/streamed/commit/0"
    assert done.json()["output"] is None
    assert listing(user.here) == {}
    assert not weights_in(user.home)
    largest = max(path.stat().st_size for path in whole.glob("*.safetensors"))
    bound = largest + 100_000  # and the small files
    assert largest < most["output"] < bound < sum(map(_size, whole.iterdir())) / 3
    files = hub.branches["me/streamed@main"]
    for path in whole.iterdir():
        if path.name not in ("README.md", "normconvert.json"):
            assert files[path.name] == path.read_bytes(), path.name
    assert set(files) == {path.name for path in whole.iterdir()}
    card = files["README.md"].decode()
    assert "The logits were not compared" in card
    assert "# The original" in card
    posts = [line for line in hub.log if line.startswith(("POST", "PUT"))]
    assert [line for line in posts if "/commit/" in line] == posts[-1:]


def _size(path: Path) -> int:
    return path.stat().st_size


def test_a_stream_that_breaks_off(user: Internet, large: Path, whole: Path) -> None:
    hub = user.hub
    index = json.loads((large / "model.safetensors.index.json").read_text())
    names = list(dict.fromkeys(index["weight_map"].values()))  # the order of the stream
    fifth, eighth = (rf"CDN .*{names[i]}( bytes=0-)?$" for i in (5, 8))
    arguments = ("flashnorm", "someone/large", "--tied", "untie", "--stream")
    hub.failures = [(fifth, 403)]
    writer = {"HF_TOKEN": "hf_writer", "HF_HUB_DISABLE_XET": "1"}
    user.run(*arguments, "--push", "me/broken", **writer).assert_refused("someone/large")
    assert listing(user.here) == {}
    assert not weights_in(user.home)
    assert "me/broken@main" not in hub.branches
    # With --resume, the Hub leaves in the middle. Then we are killed, with a shard on its way.
    hub.failures = [(fifth, 403)]
    user.run(*arguments, "--resume").assert_refused("someone/large")
    assert hub.failures == []
    hub.log.clear()
    env = user.environment()
    process = subprocess.Popen([*COMMAND, *arguments, "--resume"], cwd=user.here, env=env)
    while not any(re.search(eighth, line) for line in hub.log):
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not (user.here / "large-flashnorm").exists()
    assert not weights_in(user.home)
    done = user.run(*arguments, "--resume")
    assert done.status == 0
    assert "Resumed: 8 shards of an earlier run stayed." in done.out.splitlines()
    assert [path.name for path in user.here.iterdir()] == ["large-flashnorm"]
    same_files(user.here / "large-flashnorm", whole)
    manifest = json.loads((user.here / "large-flashnorm" / "normconvert.json").read_text())
    assert manifest["verification"]["certificate"]["rewritten"] == len(manifest["plan"]["edits"])
    assert manifest["files"] == json.loads((whole / "normconvert.json").read_text())["files"]
    # What was complete was not fetched again.
    fetched = [name for name in hub.downloads if name.endswith(".safetensors")]
    assert set(fetched) == set(names[5:])
    assert len(fetched) <= len(names[5:]) + 2


def test_a_stream_stops_at_what_is_not_certified(large: Path, tmp_path: Path) -> None:
    """One bit of the second shard is another than was written."""
    from normconvert import stream
    from normconvert.planner import REWRITES, make_plan
    from normconvert.rewrite import write_shards
    from normconvert.source import Checkpoint, open_checkpoint
    from normconvert.trace import trace

    checkpoint = open_checkpoint(str(large))
    plan = make_plan(trace(checkpoint), checkpoint, REWRITES["flashnorm"], tied="keep")
    names = [shard.name for shard in checkpoint.shards]

    def write(layouts: tuple[Any, ...], near: Checkpoint, folder: Path, listen: Any) -> None:
        write_shards(layouts, near, folder, listen)
        (layout,) = layouts
        if layout.shard.name == names[1]:
            with (folder / names[1]).open("r+b") as file:
                file.seek(-1, 2)
                last = file.read(1)[0]
                file.seek(-1, 2)
                file.write(bytes([last ^ 1]))

    sent = []

    def send(path: Path) -> bool:
        sent.append(path.name)
        return True

    with mock.patch.object(stream, "write_shards", write):
        report, kept = stream.write_stream(
            plan,
            checkpoint,
            tmp_path,
            {"plan": plan.to_json()},
            goal="there",
            certified=True,
            send=send,
            listen=ignore,
        )
    assert kept == 0
    assert report is not None
    assert report.certificate is not None
    assert not report.equivalent
    assert report.certificate.problem_count == 1
    assert sent == names[:1]


def test_what_cannot_be_streamed(large: Path, tmp_path: Path) -> None:
    with nothing_written(tmp_path):
        local = run_here("flashnorm", large, "--stream", cwd=tmp_path)
        local.assert_refused(str(large), "leave out --stream")
        some = ("flashnorm", "some/one", "--stream")
        push = (*some, "--push", "me/x")
        run_here(*push, "--resume", cwd=tmp_path).assert_refused("--resume")
        run_here(*push, "-o", "x", cwd=tmp_path).assert_refused("--output")
        run_here(*push, "--no-verify", cwd=tmp_path).assert_refused("--no-verify")
        approximate = ("prmsnorm", *push[1:])
        run_here(*approximate, cwd=tmp_path).assert_refused("approximation")
