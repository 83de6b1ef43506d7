"""By Hub id, against a server on this machine; see hub_server.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import normconvert
import zoo
from command_line import Run, environment, nothing_written, run
from hub_server import Hub, Repository, serve

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
from normconvert.source import open_checkpoint
print(open_checkpoint(sys.argv[1], revision=(sys.argv[2:] or [None])[0]).commit)"""
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


def test_needed_files() -> None:
    from normconvert.source.hub import needed_files

    names = sorted(NEEDED | NOT_NEEDED | {"model.safetensors", "model-1-of-61.safetensors"})
    expected = {*NEEDED, "model.safetensors", "model-1-of-61.safetensors"}
    assert set(needed_files(names)) == expected
    assert normconvert.SourceError.code == "source"
