"""Converted checkpoints where people serve them: each engine, against the original in that engine.

`make engines` runs these, in an environment that has the engines; a missing one is a failure. The
engines run in processes of their own (`scripts/serving.py`), in which normconvert does not exist.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_logits
from safetensors.torch import load_file, save_file
from serving import ENGINES, Ids, Logits
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, PreTrainedTokenizerFast

import normconvert
import zoo
from command_line import environment
from normconvert.api import Rewrite
from normconvert.verify.noise import perturbed

# Exporting takes minutes where others use the machine.
pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
SERVING = ROOT / "scripts" / "serving.py"
TIMES_FLOOR = 4  # as normconvert's own comparison has it
AGREE = 1e-5  # of the largest logit: what two engines may make of one checkpoint in float32
PYTORCH = "transformers"

ALONE = f"""
import runpy, sys
sys.modules["normconvert"] = None
sys.argv[0] = {str(SERVING)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A conversion of one of the originals."""

    original: str
    rewrite: Rewrite
    format: Literal["stock", "native"] = "stock"
    tied: Literal["keep", "untie"] = "keep"

    def __str__(self) -> str:
        return f"{self.original}-{self.rewrite}-{self.format}-{self.tied}"


ORIGINALS = ("tiny-llama", "tiny-gpt2", "gemma")  # Gemma's gains are 1 + w, and it is tied
STOCK = (
    Case(original="tiny-llama", rewrite="flashnorm"),
    Case(original="tiny-gpt2", rewrite="flashnorm"),
    Case(original="tiny-gpt2", rewrite="rmsnorm", tied="untie"),
    Case(original="gemma", rewrite="flashnorm", tied="untie"),
)
NATIVE = (
    Case(original="tiny-llama", rewrite="flashnorm", format="native"),
    Case(original="tiny-gpt2", rewrite="rmsnorm", format="native", tied="untie"),
    Case(original="tiny-gpt2", rewrite="crmsnorm", format="native"),
)
READ_NATIVE = tuple(engine for engine in ENGINES if engine != "ctranslate2")
# One projection that reads a folded norm keeps its old weight.
MISSED = "model.layers.0.self_attn.q_proj.weight"

every_engine = pytest.mark.parametrize("engine", ENGINES)
every_original = pytest.mark.parametrize("original", ORIGINALS)


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The folders that are served."""

    originals: Mapping[str, Path]
    perturbed: Mapping[str, Path]
    converted: Mapping[Case, Path]
    wrong: Path

    def all(self, *, native: bool) -> list[Path]:
        converted = [folder for case, folder in self.converted.items() if native or case in STOCK]
        return [*self.originals.values(), *self.perturbed.values(), *converted, self.wrong]


Served = Callable[[str], Mapping[Path, Logits]]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    folder = tmp_path_factory.mktemp("checkpoints")
    originals = {name: _original(name, folder / name) for name in ORIGINALS}
    converted = {case: folder / str(case) for case in (*STOCK, *NATIVE)}
    for case, output in converted.items():
        normconvert.convert(
            originals[case.original],
            output,
            case.rewrite,
            format=case.format,
            tied=case.tied,
            verify=False,
        )
    noisy = {}
    for name, source in originals.items():
        outputs = [converted[case] for case in STOCK if case.original == name]
        noisy[name] = _perturbed(source, outputs, folder / f"{name}-perturbed")
    wrong = folder / "wrong"
    shutil.copytree(converted[STOCK[0]], wrong)
    before, after = (load_file(_weights(each)) for each in (originals["tiny-llama"], wrong))
    save_file({**after, MISSED: before[MISSED]}, _weights(wrong), {"format": "pt"})
    return Checkpoints(originals, noisy, converted, wrong)


def _original(name: str, folder: Path) -> Path:
    """A checkpoint in float32, with a tokenizer that CTranslate2 takes: it has an unknown token."""
    if name in zoo.ZOO:
        zoo.save(name, folder, dtype="float32")
    else:
        shutil.copytree(ROOT / "models" / name, folder)
    config = AutoConfig.from_pretrained(folder)
    words = {f"word{i}": i for i in range(config.vocab_size)}
    special = {"bos_token": config.bos_token_id, "eos_token": config.eos_token_id}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="word0")),
        unk_token="word0",
        **{key: f"word{i}" for key, i in special.items()},
    ).save_pretrained(folder)
    return folder


def _perturbed(source: Path, outputs: list[Path], folder: Path) -> Path:
    """`source` with every tensor perturbed, by half a unit at most, that all `outputs` change."""
    before, *after = (load_file(_weights(each)) for each in (source, *outputs))
    moving = [
        name
        for name, tensor in before.items()
        if all(not torch.equal(tensor, other[name]) for other in after)
    ]
    generator = torch.Generator().manual_seed(0)
    noisy = {name: perturbed(before[name], before[name].dtype, generator) for name in moving}
    shutil.copytree(source, folder)
    save_file({**before, **noisy}, _weights(folder), {"format": "pt"})
    return folder


def _weights(folder: Path) -> Path:
    return folder / "model.safetensors"


@pytest.fixture(scope="session")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids that every original knows, of another shape than a model is exported with."""
    found: Ids = np.random.default_rng(0).integers(4, zoo.SIZES["vocab_size"], (3, 40))
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, found)
    return path


@pytest.fixture(scope="session")
def served(
    checkpoints: Checkpoints, ids: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """What an engine makes of every checkpoint that it is given; all engines start at once."""
    folder = tmp_path_factory.mktemp("served")
    running = {
        engine: _start(engine, ids, folder, checkpoints.all(native=engine in READ_NATIVE))
        for engine in ENGINES
    }

    @cache
    def finished(engine: str) -> Mapping[Path, Logits]:
        return _finished(running[engine], folder / f"{engine}.safetensors")

    yield finished
    for process in running.values():
        process.kill()
        process.wait()


def _start(engine: str, ids: Path, folder: Path, given: list[Path]) -> subprocess.Popen[bytes]:
    """Start `scripts/serving.py`, in which warnings are errors; its answer will be in `folder`."""
    arguments = (engine, ids, folder / f"{engine}.safetensors", *given)
    extra = {"HF_HOME": str(folder / engine), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with (folder / f"{engine}.txt").open("w") as messages:
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-c", ALONE, *map(str, arguments)],
            cwd=folder,
            env=environment(**extra),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=messages,
        )


def _finished(process: subprocess.Popen[bytes], answer: Path) -> Mapping[Path, Logits]:
    status = process.wait(timeout=1500)
    assert status == 0, answer.with_suffix(".txt").read_text()
    return {Path(name): logits for name, logits in load_logits(answer).items()}


def _distance(one: Logits, other: Logits) -> tuple[float, float]:
    """The largest and the root mean square difference."""
    assert one.shape == other.shape
    difference = one.astype(np.float64) - other.astype(np.float64)
    assert np.isfinite(difference).all()
    return float(np.abs(difference).max()), float(np.sqrt(np.square(difference).mean()))


def _times_floor(
    found: Mapping[Path, Logits], checkpoints: Checkpoints, original: str, folder: Path
) -> float:
    """How many times an engine's own noise `folder` differs from the original in that engine."""
    reference = found[checkpoints.originals[original]]
    floors = _distance(reference, found[checkpoints.perturbed[original]])
    assert min(floors) > 0
    distances = _distance(reference, found[folder])
    return max(one / floor for one, floor in zip(distances, floors, strict=True))


@every_engine
@every_original
def test_the_engine_knows_the_architecture(
    engine: str, original: str, served: Served, checkpoints: Checkpoints
) -> None:
    """Otherwise agreeing in it would mean little."""
    folder = checkpoints.originals[original]
    expected = served(PYTORCH)[folder]
    largest, _ = _distance(expected, served(engine)[folder])
    assert largest <= AGREE * np.abs(expected).max()


@every_engine
@pytest.mark.parametrize("case", STOCK, ids=str)
def test_a_stock_checkpoint_is_served_as_its_original(
    engine: str, case: Case, served: Served, checkpoints: Checkpoints
) -> None:
    folder = checkpoints.converted[case]
    assert not list(folder.glob("*.py"))
    assert _times_floor(served(engine), checkpoints, case.original, folder) <= TIMES_FLOOR


@pytest.mark.parametrize("engine", READ_NATIVE)
@pytest.mark.parametrize("case", NATIVE, ids=str)
def test_a_native_checkpoint_is_served_as_its_original(
    engine: str, case: Case, served: Served, checkpoints: Checkpoints
) -> None:
    folder = checkpoints.converted[case]
    assert _times_floor(served(engine), checkpoints, case.original, folder) <= TIMES_FLOOR


@every_engine
def test_a_wrong_fold_is_seen(engine: str, served: Served, checkpoints: Checkpoints) -> None:
    times = _times_floor(served(engine), checkpoints, "tiny-llama", checkpoints.wrong)
    assert times > 100 * TIMES_FLOOR


def test_ctranslate2_refuses_a_native_checkpoint(
    checkpoints: Checkpoints, ids: Path, tmp_path: Path
) -> None:
    """It knows model types by name: better no model than one without its norms."""
    folder = checkpoints.converted[NATIVE[0]]
    process = _start("ctranslate2", ids, tmp_path, [folder])
    assert process.wait(timeout=1500) == 1
    assert not (tmp_path / "ctranslate2.safetensors").exists()
    assert "custom code" in (tmp_path / "ctranslate2.txt").read_text()
