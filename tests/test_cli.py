"""The commands: what they print, what they write, how they end."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

import normconvert
import zoo
from command_line import COMMAND, Run, assert_sentence, environment, nothing_written, run, run_here
from normconvert.ir.plan import Plan
from normconvert.rewrite.evaluate import Evaluator

GOLDEN = Path(__file__).parent / "golden"
UPDATE = "NORMCONVERT_UPDATE_GOLDEN"  # set it to write the golden files anew
IDS = torch.arange(5, 40).reshape(5, 7)


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of the zoo by their names, and Llamas stored in other ways. Nobody writes here."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "llama_tied", "gpt2", "bert", "deepseek_v3"):
        zoo.save(name, folder / name, dtype="float32")
    zoo.save("llama", folder / "shards", dtype="bfloat16", max_shard_size="80KB")
    zoo.save("llama", folder / "other", dtype="float32", seed=1)
    for name in ("llama", "other"):
        add_tokenizer(folder / name)
    eps = Path(shutil.copytree(folder / "llama", folder / "eps"))
    config = json.loads((eps / "config.json").read_text())
    (eps / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))
    return folder


def add_tokenizer(folder: Path) -> None:
    """One token per printable character."""
    vocabulary = {chr(code): code - 31 for code in range(32, 127)} | {"\n": 0}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" ")
    fast.save_pretrained(folder)


@pytest.fixture(scope="session")
def converted(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama`, converted, with nothing but a link to the original beside it."""
    here = tmp_path_factory.mktemp("converted")
    (here / "llama").symlink_to(originals / "llama")
    result = run_here("flashnorm", "llama", cwd=here)
    assert (result.status, result.err) == (0, "")
    return here / "llama-flashnorm"


# --- quick to answer


def test_help_is_quick() -> None:
    """By the time that the process computes: others that share the cores do not count."""

    def seconds() -> float:
        silent = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
        arguments = [*COMMAND, "--help"]
        process = os.posix_spawn(COMMAND[0], arguments, environment(), file_actions=silent)
        _, status, usage = os.wait4(process, 0)
        assert status == 0
        return usage.ru_utime + usage.ru_stime

    assert statistics.median(seconds() for _ in range(7)) < 0.3


@pytest.mark.parametrize(
    "statement",
    [
        "import normconvert",
        "import normconvert.api",
        "import normconvert.cli.main as cli; sys.argv[1:] = ['--help']; cli.main()",
        "import normconvert.cli.main as cli; sys.argv[1:] = ['flashnorm', '--help']; cli.main()",
        "import normconvert.cli.main as cli; sys.argv[1:] = ['bench', '--help']; cli.main()",
    ],
)
def test_light_imports(statement: str) -> None:
    code = f"""import sys
try:
    {statement}
except SystemExit as end:
    assert not end.code
heavy = {{"torch", "transformers", "numpy", "safetensors", "huggingface_hub"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


OPTIONS = {
    "": {"--version", "--help"},
    "flashnorm": {
        "-o", "--output", "--format <stock|native>", "--tied <keep|untie>",
        "--dtype <keep|float32|bfloat16|float16>", "--dry-run", "--no-verify", "--force", "--push",
        "--resume", "--returns", "--revision", "--trust-remote-code", "--json", "--debug",
    },
    "rmsnorm": {"--format <stock|native>", "--target", "--tied <keep|untie>", "--force"},
    "crmsnorm": {"--tied <keep|untie>", "--force"},
    "prmsnorm": {"--fraction", "--force"},
    "run": {"--model", "-o", "--output", "--dry-run", "--force"},
    "inspect": {
        "--tied <keep|untie>", "--returns", "--disk-speed", "--revision", "--trust-remote-code",
        "--json", "--debug",
    },
    "verify-equivalence": {
        "--json", "--report", "--text", "--dtype <float64|float32|bfloat16|float16>", "--returns",
        "--device", "--device-map", "--max-memory", "--trust-remote-code", "--debug",
    },
    "bench": {
        "--plot", "--dtype <keep|float32|bfloat16|float16>", "--device", "--threads", "--seconds",
        "--no-compile", "--revision", "--trust-remote-code", "--json", "--debug",
    },
    "push": {
        "--private", "--revision", "--create-pr", "--commit-message", "--token", "--unverified",
        "--json", "--debug",
    },
}  # fmt: skip


@pytest.mark.parametrize("command", OPTIONS)
def test_options(command: str, tmp_path: Path) -> None:
    result = run_here(*command.split(), "--help", cwd=tmp_path, columns=80)
    assert result.status == 0
    assert result.err == ""
    assert max(map(len, result.out.splitlines())) <= 80
    shown = " ".join(result.out.split())
    for option in OPTIONS[command]:
        assert f" {option}" in shown
    for name in OPTIONS if command == "" else ():
        assert name in shown
    assert "..." not in shown.partition("Commands:")[2]  # a summary that was cut off


def test_version(tmp_path: Path) -> None:
    result = run_here("--version", cwd=tmp_path)
    assert result == Run(0, f"{normconvert.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["flashnorm"],
        ["flashnorm", "llama", "--tide", "untie"],
        ["inspect", "llama", "--tied", "no"],
    ],
)
def test_wrong_usage(arguments: list[str], tmp_path: Path) -> None:
    result = run_here(*arguments, cwd=tmp_path)
    assert result.status == 2
    assert result.out == ""
    assert "Error: " in result.err
    assert "Traceback" not in result.err
    in_json = run_here(*arguments, "--json", cwd=tmp_path)
    assert (in_json.status, in_json.err) == (2, result.err)
    error = in_json.json()["error"]
    assert error["code"] == "usage"
    assert error["message"] in " ".join(result.err.split())


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run("inspect", "nowhere", "--debug", cwd=tmp_path)
    assert result.status != 0
    assert "Traceback" in result.err
    assert "SourceError" in result.err


# --- inspect


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3"])
def test_the_table(
    name: str, columns: int, originals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)  # each takes memory
    with nothing_written(originals):
        result = run_here("inspect", name, cwd=originals, columns=columns)
    assert result.status == 0
    assert result.err == ""
    assert "\x1b" not in result.out
    text = "".join(f"{line.rstrip()}\n" for line in result.out.splitlines())
    golden = GOLDEN / f"inspect-{name}-{columns}.txt"
    if UPDATE in os.environ:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line[0] in "┏┃┡│└"]
    assert len(table) > 4
    assert max(map(len, table)) <= columns


def test_inspect_in_json(originals: Path) -> None:
    result = run_here("inspect", "gpt2", "--json", cwd=originals)
    assert result.status == 0
    assert result.err == ""
    document = result.json()
    assert Plan.from_json(document["plan"]) == normconvert.inspect(originals / "gpt2").plan
    assert document["model"] == "gpt2"
    assert document["commit"] is None
    sizes = {
        name: tensor.nbytes
        for name, tensor in load_file(originals / "gpt2" / "model.safetensors").items()
    }
    assert document["total_bytes"] == sum(sizes.values())
    assert document["changed_bytes"] == sum(
        sizes[edit["tensor"]] for edit in document["plan"]["edits"]
    )
    assert document["added_bytes"] == 0


def test_inspect_with_the_head_untied(originals: Path) -> None:
    kept = run_here("inspect", "llama_tied", cwd=originals).out
    untied = run_here("inspect", "llama_tied", "--tied", "untie", cwd=originals).out
    assert "--tied untie" in kept
    assert "6 of 7 norms fold" in kept
    assert "7 of 7 norms fold" in untied
    assert "the output grows by 21.8 kB" in untied
    assert "grow by 21.8 kB" in kept


# --- flashnorm


def test_the_first_run(originals: Path, tmp_path: Path) -> None:
    """The first thing that a user does: the command on a folder, with nothing said."""
    (tmp_path / "llama").symlink_to(originals / "llama")
    result, output = run("flashnorm", "llama", cwd=tmp_path), tmp_path / "llama-flashnorm"
    assert result.status == 0
    assert result.err == ""
    assert "Folded 7 of 7 norms" in result.out
    assert "Equivalent: " in result.out
    assert re.search(r"positions +│ +128 │ +128 │", result.out)
    assert result.out.endswith("Wrote llama-flashnorm\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "llama-flashnorm"]
    source = {path.name for path in (originals / "llama").iterdir()}
    assert {path.name for path in output.iterdir()} == source | {"normconvert.json"}
    for name in source - {"model.safetensors"}:
        assert (output / name).read_bytes() == (originals / "llama" / name).read_bytes()
    logits = [zoo.logits(folder, IDS) for folder in (originals / "llama", output)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    assert (load_file(output / "model.safetensors")["model.norm.weight"] == 1).all()


def test_every_file_comes_along(originals: Path, tmp_path: Path) -> None:
    """Linked and empty folders, an index that nobody reads; a link in a circle ends."""
    source = Path(shutil.copytree(originals / "llama", tmp_path / "llama"))
    (source / "empty").mkdir()
    (source / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "notes.txt").write_text("kept")
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "empty" / "circle").symlink_to(source)
    result = run_here("flashnorm", "llama", "--no-verify", cwd=tmp_path)
    assert result.status == 0
    assert result.out.splitlines()[1:] == [
        "Not verified: no certificate was made, and no logits were compared.",
        "Wrote llama-flashnorm",
    ]
    output = tmp_path / "llama-flashnorm"
    assert list((output / "empty").iterdir()) == []
    assert (output / "linked" / "notes.txt").read_text() == "kept"
    assert not (output / "linked").is_symlink()
    assert (output / "model.safetensors.index.json").read_text() == "{}"


def test_the_manifest(converted: Path, originals: Path) -> None:
    text = (converted / "normconvert.json").read_text(encoding="utf-8")
    manifest = json.loads(text)
    assert manifest["normconvert"] == normconvert.__version__
    assert manifest["source"] == {"model": "llama", "commit": None}
    assert manifest["options"] == {
        "rewrites": ["flashnorm"],
        "format": "stock",
        "tied": "keep",
        "dtype": "keep",
        "fraction": 0.0625,
        "target": None,
        "returns": [],
    }
    assert Plan.from_json(manifest["plan"]) == normconvert.inspect(originals / "llama").plan
    again = Plan.from_json(manifest["plan"]).to_json()
    assert json.loads(json.dumps(again)) == manifest["plan"]
    assert not re.search(r'"[^"]*/', text)
    for place in (originals, converted.parent, Path.home()):
        assert str(place) not in text


def test_an_existing_output(converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted.parent, tmp_path / "work", symlinks=True)
    cwd = tmp_path / "work"
    with nothing_written(cwd):
        run_here("flashnorm", "llama", cwd=cwd).assert_refused("llama-flashnorm", "--force")
        planned = run_here("flashnorm", "llama", "--dry-run", cwd=cwd)
    assert planned.status == 0
    assert planned.out.endswith("Dry run: nothing was written.\n")
    (cwd / "llama-flashnorm" / "notes").write_text("mine")
    with nothing_written(cwd):
        run_here("flashnorm", "llama", "--force", cwd=cwd).assert_refused("flashnorm/notes")
    (cwd / "llama-flashnorm" / "notes").unlink()
    result = run_here("flashnorm", "llama", "--force", "--no-verify", "--json", cwd=cwd)
    assert result.status == 0
    assert result.err == ""
    document = result.json()
    assert document["status"] == "converted"
    assert document["output"] == "llama-flashnorm"
    assert document["verification"] is None
    assert {path.name for path in cwd.iterdir()} == {"llama", "llama-flashnorm"}


@pytest.mark.parametrize("manifest", [True, False])
def test_what_is_converted_already(converted: Path, manifest: bool, tmp_path: Path) -> None:
    """Known by its gains, not by the manifest beside them."""
    shutil.copytree(converted, tmp_path / "again")
    if not manifest:
        (tmp_path / "again" / "normconvert.json").unlink()
    with nothing_written(tmp_path):
        result = run_here("flashnorm", "again", cwd=tmp_path)
        document = run_here("flashnorm", "again", "--json", cwd=tmp_path).json()
    assert result.status == 0
    assert "again is converted already" in result.out
    assert document["status"] == "unchanged"
    assert document["output"] is None


def test_what_does_not_verify_does_not_appear(originals: Path, tmp_path: Path) -> None:
    rows = Evaluator.rows

    def wrong(self: Evaluator, *arguments: Any) -> torch.Tensor:
        return rows(self, *arguments) * 1.01

    with nothing_written(tmp_path), mock.patch.object(Evaluator, "rows", wrong):
        model = originals / "llama"
        result = run_here("flashnorm", model, "-o", "a/output", cwd=tmp_path)
        in_json = run_here("flashnorm", model, "-o", "a/output", "--json", cwd=tmp_path)
    assert (result.status, in_json.status) == (1, 1)
    assert "Not equivalent: " in result.out
    assert "removed" in result.out
    assert in_json.json()["status"] == "rejected"
    assert in_json.json()["output"] is None
    assert in_json.json()["verification"]["equivalent"] is False


def test_shards_stay(originals: Path, tmp_path: Path) -> None:
    result = run_here("flashnorm", originals / "shards", "-o", "output", cwd=tmp_path)
    assert result.status == 0
    names = sorted(path.name for path in (originals / "shards").glob("*.safetensors*"))
    assert len(names) > 3
    assert sorted(path.name for path in (tmp_path / "output").glob("*.safetensors*")) == names
    for name in names[:-1]:
        with (
            safe_open(originals / "shards" / name, "pt") as before,
            safe_open(tmp_path / "output" / name, "pt") as after,
        ):
            assert list(before.keys()) == list(after.keys())
            assert before.metadata() == after.metadata()
            dtypes = {after.get_slice(key).get_dtype() for key in list(after.keys())}
            assert dtypes == {"BF16"}
    for path in (originals / "shards").glob("*.json"):
        assert (tmp_path / "output" / path.name).read_bytes() == path.read_bytes()
    again = run_here("flashnorm", "output", cwd=tmp_path)
    assert (again.status, "converted already" in again.out) == (0, True)


def test_another_dtype(originals: Path, tmp_path: Path) -> None:
    arguments = ("flashnorm", originals / "llama", "-o", "output", "--dtype", "bfloat16")
    result = run_here(*arguments, cwd=tmp_path)
    assert result.status == 0
    assert "Equivalent: " in result.out
    stored = load_file(tmp_path / "output" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    before = json.loads((originals / "llama" / "config.json").read_text())
    after = json.loads((tmp_path / "output" / "config.json").read_text())
    assert after == {**before, "dtype": "bfloat16"}
    # What is converted can still be given another dtype.
    back = run_here("flashnorm", "output", "-o", "back", "--dtype", "float32", cwd=tmp_path)
    assert back.status == 0
    wide = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(wide[name], tensor.float()) for name, tensor in stored.items())


@pytest.mark.parametrize(
    ("name", "head"),
    [("llama_tied", "lm_head.weight"), ("gpt2", "lm_head.weight"), ("bert", "cls.predictions.")],
)
def test_untie(name: str, head: str, originals: Path, tmp_path: Path) -> None:
    arguments = ("flashnorm", originals / name, "-o", "output", "--tied", "untie")
    result = run_here(*arguments, cwd=tmp_path)
    assert result.status == 0
    source = load_file(originals / name / "model.safetensors")
    stored = load_file(tmp_path / "output" / "model.safetensors")
    added = set(stored) - set(source)
    assert added
    assert all(tensor.startswith(head) for tensor in added)
    before = json.loads((originals / name / "config.json").read_text())
    after = json.loads((tmp_path / "output" / "config.json").read_text())
    assert after == {**before, "tie_word_embeddings": False}
    model = zoo.load(tmp_path / "output")  # raises if a tensor is missing, or not one of its own
    head_weight = model.get_output_embeddings().weight
    assert head_weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()
    torch.testing.assert_close(
        zoo.run(model, IDS), zoo.logits(originals / name, IDS), rtol=0, atol=1e-4
    )


OWN_CODE = {
    "configuration_own.py": """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
""",
    "modeling_own.py": """
import torch
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class Unnameable(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 3e-5) * self.weight

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.norm = Unnameable(config.hidden_size)
""",
}


def test_code_of_the_checkpoint_runs_when_trusted(originals: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(originals / "llama", tmp_path / "own"))
    for name, code in OWN_CODE.items():
        (own / name).write_text(code)
    config = json.loads((own / "config.json").read_text())
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    names = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    (own / "config.json").write_text(json.dumps({**config, **names}))
    modules = environment(HF_MODULES_CACHE=str(tmp_path / "modules"))
    result = run("flashnorm", "own", "--trust-remote-code", "--json", cwd=tmp_path, env=modules)
    assert (result.status, result.err) == (0, "")
    document = result.json()
    verdicts = {v["norm"]: v for v in document["inspection"]["plan"]["verdicts"]}
    assert len(verdicts) == 7
    assert {verdict["action"] for verdict in verdicts.values()} == {"fold"}
    assert verdicts["model.norm"]["eps"] == pytest.approx(3e-5)
    assert document["verification"]["equivalent"] is True
    for name, code in OWN_CODE.items():
        assert (tmp_path / "own-flashnorm" / name).read_text() == code


# --- verify-equivalence


def verify(cwd: Path, *arguments: str | Path) -> Run:
    return run_here("verify-equivalence", *arguments, cwd=cwd)


def test_the_page(converted: Path, originals: Path, tmp_path: Path) -> None:
    """Self-contained, well-formed, with everything in it that the report has."""
    good, bad = tmp_path / "good.html", tmp_path / "bad.html"
    assert verify(tmp_path, originals / "llama", converted, "--report", good).status == 0
    odd = Path(shutil.copytree(originals / "other", tmp_path / "<b>odd & ends"))
    differing = verify(tmp_path, originals / "llama", odd, "--report", bad)
    assert differing.status == 1
    (parting,) = (line for line in differing.out.splitlines() if line.startswith("The two part"))
    for path, words in (
        (
            good,
            [
                "<h1 class='good'>Equivalent",
                "Certificate: valid",
                "7 rewritten norms",
                "perplexity, original",
                "up to 4 is equivalent",
                "<th class='row'>  noise floor</th>",
                "th.row { white-space: pre }",
                "all of 16 tokens are the same",
            ],
        ),
        (
            bad,
            [
                "<h1 class='bad'>Not equivalent",
                f"{parting}</p>",
                "&lt;b&gt;odd",
                "of 16 tokens are the same",
            ],
        ),
    ):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?:|<script|<link|<img|@import|url\(", text)
        assert all(word in text for word in words)
        assert text.count("<svg") == 4  # the layers, and how the logits differ on three sets
        assert "nan" not in text.lower()
        counter = Counter(re.findall(r"<(/?[a-z0-9]+)", text))
        for tag in ("table", "tr", "td", "th", "svg", "details", "p", "h2", "code", "body"):
            assert counter[tag] == counter[f"/{tag}"], tag


def test_verify_the_first_run(converted: Path, originals: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = verify(tmp_path, originals / "llama", converted, "--json", report)
    assert (result.status, result.err) == (0, "")
    assert "Equivalent: " in result.out
    document = json.loads(report.read_text())
    on_stdout = verify(tmp_path, originals / "llama", converted, "--json", "-")
    assert on_stdout.status == 0
    assert on_stdout.json() == document
    assert document["equivalent"] is True
    assert document["dtype"] == "float64"
    found = [comparison["tokens"] for comparison in document["comparisons"]]
    assert found == ["text", "random", "token by token"]
    generation = document["generation"]
    assert generation["original"] == generation["converted"]
    assert (generation["tokens"], generation["same"]) == (16, 16)
    assert f"both write {generation['original']!r}." in result.out
    for comparison in document["comparisons"]:
        assert 0 < comparison["max"] <= 4 * comparison["floor_max"] < 1e-4
        assert comparison["top1"] == 1


def test_verify_on_a_text_and_in_a_dtype(converted: Path, originals: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A text of one's own. " * 5)
    more = ("--text", "text.txt", "--dtype", "float32", "--json", "-")
    document = verify(tmp_path, originals / "llama", converted, *more).json()
    assert document["dtype"] == "float32"
    assert document["comparisons"][0]["positions"] in (64, 105)
    assert document["equivalent"] is True
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe\xfd")
    verify(tmp_path, originals / "llama", converted, *more[:2]).assert_refused("text.txt", "UTF-8")
    wrong = verify(tmp_path, originals / "llama", converted, "--text", "nowhere.txt")
    assert wrong.status == 2
    assert "nowhere.txt" in wrong.err


def test_verify_the_same(originals: Path, tmp_path: Path) -> None:
    result = verify(tmp_path, originals / "llama", originals / "llama")
    assert result.status == 0
    assert "no tensor differs" in result.out


@pytest.mark.parametrize("other", ["other", "eps", "gpt2"])
def test_verify_what_is_not(other: str, originals: Path, tmp_path: Path) -> None:
    """Other weights, another epsilon with the same weights, another architecture."""
    result = verify(tmp_path, originals / "llama", originals / other)
    assert (result.status, result.err) == (1, "")
    assert "Not equivalent: " in result.out
    in_json = verify(tmp_path, originals / "llama", originals / other, "--json", "-")
    assert in_json.status == 1
    assert in_json.json()["equivalent"] is False


def test_verify_what_is_not_a_number(originals: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(originals / "llama", tmp_path / "nan"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    result = verify(tmp_path, originals / "llama", broken, "--json", "-")
    assert result.status == 1
    assert result.json()["equivalent"] is False  # and where JSON has no number, it says null
    assert result.json()["comparisons"][0]["rms"] is None
    assert "not numbers" in verify(tmp_path, broken, broken).out
    assert "of the original's logits" in verify(tmp_path, broken, originals / "llama").out


def test_verify_what_cannot_be_compared(originals: Path, tmp_path: Path) -> None:
    with nothing_written(tmp_path):
        verify(tmp_path, originals / "llama", "nowhere").assert_refused("nowhere")
        verify(tmp_path, "nowhere", "nowhere", "--json", "-").assert_refused(code="source")


@pytest.mark.parametrize("old", [False, True])
def test_no_older_report_survives_what_is_refused(old: bool, tmp_path: Path) -> None:
    """Who reads the files alone must not take an earlier answer for this one."""
    report, page = tmp_path / "report.json", tmp_path / "page.html"
    for path in (report, page) if old else ():
        path.write_text('{"equivalent": true}')
    files = (f"--json={report}", "--report", page)
    verify(tmp_path, "nowhere", "nowhere", *files).assert_refused("nowhere")
    error = json.loads(report.read_text())["error"]
    assert (error["code"], error["message"].split()[0]) == ("source", "nowhere")
    assert not page.exists()


def test_wrong_usage_touches_no_file(tmp_path: Path) -> None:
    """What was given as a report may be meant as something else."""
    files = tmp_path / "notes.json", tmp_path / "page.html"
    for path in files:
        path.write_text("mine")
    assert verify(tmp_path, "nowhere", "--json", files[0], "--report", files[1]).status == 2
    assert [path.read_text() for path in files] == ["mine", "mine"]
    assert {*tmp_path.iterdir()} == {*files}


@pytest.mark.parametrize("option", ["--json", "--report"])
def test_a_report_replaces_no_file_of_a_model(option: str, originals: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(originals / "llama", tmp_path / "llama"))
    before = (model / "config.json").read_bytes()
    for pair in (("llama", "nowhere"), ("nowhere", "llama")):
        result = verify(tmp_path, *pair, option, model / "config.json")
        assert result.status == 2
        assert "give the report another place" in " ".join(result.err.split())
        assert (model / "config.json").read_bytes() == before


def test_reports_that_are_no_files_stay(tmp_path: Path) -> None:
    (tmp_path / "page.html").mkdir()
    os.mkfifo(tmp_path / "pipe")
    verify(tmp_path, "a", "b", "--json", "/dev/null", "--report", "pipe").assert_refused("a")
    assert verify(tmp_path, "a", "b", "--report", "page.html").status == 2
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "page.html"}


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_a_reader_that_leaves_changes_nothing(
    arguments: tuple[str, ...], originals: Path, tmp_path: Path
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [*COMMAND, "flashnorm", str(originals / "llama"), "--no-verify", *arguments]
    with os.fdopen(writing, "wb") as closed:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(), stdout=closed, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "llama-flashnorm" / "config.json").is_file()


@pytest.mark.parametrize("arguments", [(), ("--json",)], ids=["text", "json"])
def test_what_cannot_be_printed(
    arguments: tuple[str, ...], originals: Path, tmp_path: Path
) -> None:
    command = [*COMMAND, "flashnorm", str(originals / "llama"), "--no-verify", *arguments]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert_sentence(done.stderr.removeprefix("normconvert: ").rstrip(), "is complete", "No space")
    assert (tmp_path / "llama-flashnorm" / "normconvert.json").is_file()


def test_a_closed_stdout(originals: Path, tmp_path: Path) -> None:
    command = [*COMMAND, "flashnorm", str(originals / "llama"), "--no-verify"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command],
        cwd=tmp_path, env=environment(), stderr=subprocess.PIPE,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "llama-flashnorm" / "normconvert.json").is_file()


def test_a_report_into_a_folder(converted: Path, originals: Path) -> None:
    for option in ("--report", "--json"):
        result = run_here(
            "verify-equivalence", originals / "llama", converted, option, ".", cwd=converted.parent
        )
        assert result.status == 2
        assert f"Invalid value for '{option}'" in result.err
        assert result.out == ""


def test_a_terminal_of_ascii(originals: Path, tmp_path: Path) -> None:
    result = run(
        "inspect", originals / "llama", cwd=tmp_path, env=environment(PYTHONIOENCODING="ascii")
    )
    assert (result.status, result.err) == (0, "")
    assert "RMSNorm ? w" in result.out


def test_a_home_that_nobody_has(originals: Path, tmp_path: Path) -> None:
    run_here("inspect", "~nobody-at-all/llama", cwd=tmp_path).assert_refused("~nobody-at-all")
    run_here(
        "flashnorm", originals / "llama", "--output", "~nobody-at-all/x", cwd=tmp_path
    ).assert_refused("~nobody-at-all")
    assert not list(tmp_path.iterdir())


def test_inspect_notices_a_conversion(converted: Path) -> None:
    result = run_here("inspect", converted, cwd=converted.parent)
    assert "Converted already (flashnorm)" in result.out
    assert result.out.count("│ folded") == 3
    assert "q_proj, k_proj" in result.out
    assert " folds" not in result.out
    assert "stays" not in result.out
    assert "would read" not in result.out
    report = run_here("inspect", converted, "--json", cwd=converted.parent).json()
    assert report["done"] == ["flashnorm"]
    assert (report["plan"]["edits"], report["changed_tensors"]) == ([], 0)
    cost = report["cost"]
    assert (cost["read_bytes"], cost["written_bytes"], cost["seconds"]) == (0, 0, 0)


def test_inspect_says_what_a_conversion_left(originals: Path, tmp_path: Path) -> None:
    """The gain in front of the tied head stays, until the head is untied."""
    command = ("flashnorm", originals / "llama_tied", "--no-verify", "-o", "out")
    assert run_here(*command, cwd=tmp_path).status == 0
    left = run_here("inspect", "out", cwd=tmp_path).out
    assert left.count("│ folded") == 2
    assert "model.norm stays: its reader lm_head.weight is tied to" in left
    assert "Converted already" in left
    more = run_here("inspect", "out", "--tied", "untie", cwd=tmp_path).out
    assert more.count("│ folded") == 2
    assert "\n1 of 7 norms fold: " in more
    assert "Converted already" not in more


def test_inspect_of_centered_weights(originals: Path, tmp_path: Path) -> None:
    command = ("rmsnorm", originals / "gpt2", "--format", "stock", "--tied", "untie", "-o", "out")
    assert run_here(*command, "--no-verify", cwd=tmp_path).status == 0
    result = run_here("inspect", "out", cwd=tmp_path)
    assert "Converted already (rmsnorm, flashnorm)" in result.out
    assert "folds" not in result.out
    assert "converts" not in result.out
    assert result.out.count("│ converted") == 3
