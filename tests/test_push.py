"""Publishing, against a Hub on this machine; see hub_server.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import zoo
from command_line import Run, assert_sentence, environment, run, run_here
from hub_server import Hub, serve

REPO = "me/llama-flashnorm"
CARD = """---
license: mit
pipeline_tag: text-generation
language: en
tags:
- tiny
---

# The original

What its makers say.
"""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("here")
    zoo.save("llama", here / "llama", dtype="float32")
    (here / "llama" / "README.md").write_text(CARD)
    assert run_here("flashnorm", "llama", cwd=here).status == 0
    return here / "llama-flashnorm"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


def push(hub: Hub, folder: Path, *arguments: str, token: str = "hf_writer") -> Run:
    variables = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    home = str(folder.parent / "home")  # without a token of whoever runs the tests
    env = environment(**variables, HF_HOME=home, HF_HUB_DISABLE_PROGRESS_BARS="1")
    if token:
        env["HF_TOKEN"] = token
    return run("push", folder, *arguments, cwd=folder.parent, env=env)


def test_push(hub: Hub, converted: Path) -> None:
    result = push(hub, converted, REPO, "--private")
    assert (result.status, result.err) == (0, "")
    assert result.out == f"Pushed: {hub.url}/{REPO}/commit/0\n"
    assert hub.created == {REPO: True}
    files = hub.branches[f"{REPO}@main"]
    local = {
        path.relative_to(converted).as_posix(): path.read_bytes()
        for path in converted.rglob("*")
        if path.is_file()
    }
    assert set(files) == set(local)
    assert {name for name in files if files[name] != local[name]} == {"README.md"}
    assert hub.messages == ["llama rewritten by normconvert (flashnorm)"]
    for text in (*files.values(), result.out.encode()):
        assert b"hf_writer" not in text
    # Again: what the Hub has is not sent again, and the repository may exist.
    sent = len(hub.blobs)
    again = push(hub, converted, REPO, "--commit-message", "Once more", "--json")
    assert again.json() == {"url": f"{hub.url}/{REPO}/commit/0"}
    assert len(hub.blobs) == sent
    assert hub.messages[1] == "Once more"


def test_the_card(hub: Hub, converted: Path, tmp_path: Path) -> None:
    assert push(hub, converted, REPO).status == 0
    text = hub.branches[f"{REPO}@main"]["README.md"].decode()
    card = ModelCard(text)
    data = card.data.to_dict()  # type: ignore[no-untyped-call]
    assert (data["license"], data["pipeline_tag"], data["language"]) == (
        "mit",
        "text-generation",
        "en",
    )
    assert data["library_name"] == "transformers"
    assert data["tags"] == ["tiny", "normconvert", "flashnorm"]
    assert "base_model" not in data  # a local folder is no repository
    for words in (
        "FlashNorm", "7 norms changed", "every runtime that loads the original loads this",
        "Equivalent; 23 rewritten tensors", "| noise floor", "arXiv:2407.09577",
        "$ normconvert flashnorm llama --format stock", "# The original", "What its makers say.",
    ):  # fmt: skip
        assert words in text, words
    # Publishing what was published does not stack our section.
    twice = Path(shutil.copytree(converted, tmp_path / "llama-flashnorm"))
    (twice / "README.md").write_text(text)
    assert push(hub, twice, REPO).status == 0
    assert hub.branches[f"{REPO}@main"]["README.md"].decode() == text
    # Without a card of the source.
    (twice / "README.md").write_text("# No metadata")
    assert push(hub, twice, REPO).err == ""
    text = hub.branches[f"{REPO}@main"]["README.md"].decode()
    assert ModelCard(text).data.to_dict()["pipeline_tag"] == "text-generation"  # type: ignore[no-untyped-call]
    assert text.endswith("# No metadata\n")
    # From a repository of the Hub: its name, its commit, and the command with both.
    manifest = json.loads((twice / "normconvert.json").read_text())
    manifest["source"] = {"model": "someone/llama", "commit": "abc123"}
    (twice / "normconvert.json").write_text(json.dumps(manifest))
    assert push(hub, twice, REPO).status == 0
    text = hub.branches[f"{REPO}@main"]["README.md"].decode()
    data = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    assert data["base_model"] == "someone/llama"
    assert data["base_model_relation"] == "quantized"
    assert "$ normconvert flashnorm someone/llama --revision abc123" in text


def test_a_branch_and_a_pull_request(hub: Hub, converted: Path) -> None:
    assert push(hub, converted, REPO, "--revision", "folded").status == 0
    assert f"{REPO}@folded" in hub.branches
    result = push(hub, converted, REPO, "--create-pr")
    assert result.err == ""
    assert result.out == f"Pushed: {hub.url}/{REPO}/discussions/1\n"
    assert f"{REPO}@refs/pr/1" in hub.branches
    assert f"{REPO}@main" not in hub.branches


def test_native(hub: Hub, tmp_path: Path) -> None:
    """Converted and pushed by one command; its approximation only by a word of one's own."""
    zoo.save("gpt2", tmp_path / "gpt2", dtype="float32")
    variables = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    env = environment(**variables, HF_TOKEN="hf_writer", HF_HUB_DISABLE_PROGRESS_BARS="1")
    result = run("rmsnorm", "gpt2", "--push", "me/rms", "--json", cwd=tmp_path, env=env)
    assert (result.status, result.err) == (0, "")
    assert result.json()["pushed"] == f"{hub.url}/me/rms/commit/0"
    text = hub.branches["me/rms@main"]["README.md"].decode()
    assert 'from_pretrained("me/rms", trust_remote_code=True)' in text
    assert "arXiv:2305.14858" in text
    stored = json.loads(hub.branches["me/rms@main"]["normconvert.json"])["verification"]
    assert (stored["original"], stored["converted"]) == ("gpt2", "gpt2-rmsnorm")
    run_here("flashnorm", "gpt2", "--no-verify", "--push", "me/x", cwd=tmp_path).assert_refused(
        "--no-verify"
    )
    converted = run_here("prmsnorm", "gpt2-rmsnorm", "-o", "partial", cwd=tmp_path)
    assert converted.status == 0
    assert "which is what computing in another order does, for no tensor differs." in converted.out
    push(hub, tmp_path / "partial", "me/p").assert_refused("not equivalent", "--unverified")
    assert push(hub, tmp_path / "partial", "me/p", "--unverified").status == 0
    assert "Not equivalent" in hub.branches["me/p@main"]["README.md"].decode()


def test_what_cannot_be_pushed_costs_no_time(hub: Hub, tmp_path: Path) -> None:
    zoo.save("gpt2", tmp_path / "gpt2", dtype="float32")
    variables = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    env = environment(**variables, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    for command, place, token, *words in (
        ("rmsnorm", "me/x", "", "hf auth login"),
        ("rmsnorm", "a name", "hf_writer", "'a name'", "USER/NAME"),
        ("rmsnorm", "name", "hf_writer", "'name'", "USER/NAME"),
        ("prmsnorm", "me/x", "hf_writer", "approximation", "--unverified"),
    ):
        named = {**env, "HF_TOKEN": token} if token else env
        result = run(command, "gpt2", "-o", "new", "--push", place, cwd=tmp_path, env=named)
        result.assert_refused(*words)
        assert not (tmp_path / "new").exists()
    # What shows only then leaves the conversion, and says how to go on.
    named = {**env, "HF_TOKEN": "hf_reader"}
    result = run("rmsnorm", "gpt2", "-o", "new", "--push", "me/x", cwd=tmp_path, env=named)
    assert result.status == 2
    assert "permission" in result.err
    assert "normconvert push new me/x" in result.err
    assert (tmp_path / "new" / "normconvert.json").is_file()


def test_refusals(hub: Hub, converted: Path, tmp_path: Path) -> None:
    push(hub, converted, REPO, token="").assert_refused(REPO, "hf auth login")
    push(hub, converted, REPO, token="hf_nobody").assert_refused(REPO, "hf auth login")
    push(hub, converted, REPO, token="hf_reader").assert_refused(REPO, "permission")
    push(hub, converted, "a name").assert_refused("'a name'", "USER/NAME")
    push(hub, converted.parent / "llama", REPO).assert_refused("no conversion")
    unverified = Path(shutil.copytree(converted, tmp_path / "unverified"))
    manifest = json.loads((unverified / "normconvert.json").read_text())
    del manifest["verification"]
    (unverified / "normconvert.json").write_text(json.dumps(manifest))
    push(hub, unverified, REPO).assert_refused("not verified", "--unverified")
    assert not hub.branches
    hub.failures = [("/commit/main", 409)]
    push(hub, converted, REPO).assert_refused(REPO, "push again")
    gone = Hub(url="http://127.0.0.1:9")
    push(gone, converted, REPO).assert_refused(REPO, "connection")


def test_what_passes_is_tried_again(hub: Hub, converted: Path) -> None:
    hub.failures = [("/preupload/main", 503), ("/objects/batch", 500), ("PUT", 503)]
    assert push(hub, converted, REPO).status == 0
    assert hub.failures == []
    assert hub.log.count(f"POST /api/models/{REPO}/preupload/main") == 2


def test_a_name_that_is_taken(hub: Hub, converted: Path) -> None:
    """A checkpoint that is no conversion is not written over, unless one says where."""
    hub.created[REPO] = False
    theirs = {"config.json": b"{}", "model.safetensors.index.json": b"{}", "notes.md": b"Mine."}
    hub.branches[f"{REPO}@main"] = dict(theirs)
    push(hub, converted, REPO).assert_refused(REPO, "taken", "--create-pr")
    assert hub.branches[f"{REPO}@main"] == theirs
    assert push(hub, converted, REPO, "--create-pr").status == 0
    assert hub.branches[f"{REPO}@main"] == theirs
    for name in ("pytorch_model.bin", "model.gguf", "adapter_model.safetensors", "notes.md"):
        hub.branches[f"{REPO}@main"] = {".gitattributes": b"", name: b"Mine."}
        push(hub, converted, REPO).assert_refused(REPO, "taken", name)
    hub.branches[f"{REPO}@main"] = {".gitattributes": b"", "README.md": b"", "LICENSE": b""}
    assert push(hub, converted, REPO).status == 0
    # An earlier conversion is replaced: its index would be read in the place of one file.
    hub.branches[f"{REPO}@main"] = {**theirs, "normconvert.json": b"{}"}
    assert push(hub, converted, REPO).status == 0
    files = hub.branches[f"{REPO}@main"]
    assert files["notes.md"] == b"Mine."
    assert "model.safetensors.index.json" not in files
    assert files["config.json"] == (converted / "config.json").read_bytes()


def test_what_the_hub_answers(hub: Hub, converted: Path) -> None:
    """One process for all statuses; each is the answer to one request."""
    code = """import sys
from normconvert.publish import PushError, push
for _ in range(int(sys.argv[2])):
    try:
        push(sys.argv[1], "me/x")
    except PushError as error:
        print(error)"""
    answers = {401: "hf auth login", 403: "permission", 409: "push again", 404: "check the name"}
    hub.failures = [("/commit/main", status) for status in answers]
    env = environment(
        HF_ENDPOINT=hub.url,
        HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_XET="1",
        HF_TOKEN="hf_writer",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
    )
    command = [sys.executable, "-c", code, str(converted), str(len(answers))]
    done = subprocess.run(command, env=env, check=True, text=True, stdout=subprocess.PIPE)
    for said, words in zip(done.stdout.splitlines(), answers.values(), strict=True):
        assert_sentence(said, "me/x", words)
    assert not hub.branches
