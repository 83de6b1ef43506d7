"""The noise floor where weights are 0: as low as what the conversion rounds, and no lower."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import normconvert
from normconvert.api import Rewrite
from normconvert.verify import logits
from normconvert.verify.noise import perturbed, unit_in_the_last_place

MODELS = Path(__file__).parents[1] / "models"
WEIGHTS = "model.safetensors"
BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize("dtype", BITS)
def test_a_unit_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    """Among subnormals too, and at the smallest of them."""
    random = torch.Generator().manual_seed(0)
    smallest, largest = (int(torch.tensor(x, dtype=dtype).view(BITS[dtype])) for x in (0.0, 1e4))
    bits = torch.randint(smallest + 1, largest, (5000,), generator=random)
    bits = torch.cat([bits, torch.arange(1, 50)]).to(BITS[dtype])
    weight, following = bits.view(dtype), (bits + 1).view(dtype)
    expected = following.to(torch.float64) - weight.to(torch.float64)
    for signed in (weight, -weight):
        assert torch.equal(unit_in_the_last_place(signed.double(), dtype), expected)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_zero_is_exact_unless_something_is_added(compute: torch.dtype) -> None:
    weight = torch.tensor([0.0, -0.0, 0.0, 3.0], dtype=compute).repeat(100_000)
    became = torch.tensor([0.0, 0.0, 5.0, 100.0], dtype=compute).repeat(100_000)
    random = torch.Generator().manual_seed(0)
    for rounded, units in ((None, (0, 0, 0, 2**-6)), (became, (0, 0, 2**-5, 2**-6))):
        found = perturbed(weight, torch.bfloat16, random, rounded).double() - weight.double()
        for noise, unit in zip(found.view(-1, 4).T, units, strict=True):
            assert float(noise.square().mean()) == pytest.approx(unit**2 / 12, rel=0.03)
            assert float(noise.abs().max()) <= unit


def changed(source: Path, folder: Path, dtype: str, change: Callable[[Tensors], None]) -> Path:
    """A copy of `source` with other weights, stored in `dtype`."""
    copy = Path(shutil.copytree(source, folder))
    tensors = {name: tensor.float() for name, tensor in load_file(copy / WEIGHTS).items()}
    change(tensors)
    stored = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    save_file(stored, copy / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    return copy


def prune(tensors: Tensors) -> None:
    """Nine in ten weights of every matrix, the first ten rows of embeddings, and some gains."""
    random = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            tensor[torch.rand(tensor.shape, generator=random) < 0.9] = 0
        if name.endswith(("embed_tokens.weight", "wte.weight", "norm.weight", "ln_1.bias")):
            tensor[:10] = 0


@pytest.mark.parametrize(("dtype", "power"), [("float32", -14), ("bfloat16", -1)])
def test_a_small_fault_in_a_pruned_model_is_found(dtype: str, power: int, tmp_path: Path) -> None:
    """Which noise on the zeros, of a unit of 0.5, would hide: 20 times what the others have."""
    source = changed(MODELS / "tiny-llama", tmp_path / "source", dtype, prune)
    output = tmp_path / "output"
    normconvert.convert(source, output, "flashnorm", verify=False)

    def fault(tensors: Tensors) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][5] *= 1 + 2.0**power

    wrong = changed(output, tmp_path / "wrong", dtype, fault)
    (wrong / "normconvert.json").unlink()  # the certificate would see it
    assert normconvert.verify_equivalence(source, output).equivalent
    report = normconvert.verify_equivalence(source, wrong)
    assert not report.equivalent
    assert report.parts_at == "model.layers.1"


@pytest.mark.parametrize(
    ("rewrite", "dtype"),
    [("flashnorm", "float16"), ("rmsnorm", "bfloat16"), ("crmsnorm", "float32")],
)
def test_a_pruned_model_is_no_false_alarm(rewrite: Rewrite, dtype: str, tmp_path: Path) -> None:
    source = changed(MODELS / "tiny-gpt2", tmp_path / "source", dtype, prune)
    report = normconvert.convert(source, tmp_path / "output", rewrite, verify=False)
    assert report.status == "converted"
    found = normconvert.verify_equivalence(source, tmp_path / "output")
    assert found.equivalent
    times = (each.rms / each.floor_rms for each in found.comparisons)
    assert all(0.1 < each < 2 for each in times)


def test_a_bias_of_zero_that_becomes_a_large_one_is_no_false_alarm(tmp_path: Path) -> None:
    """c = 0 becomes W b, whose rounding is the largest of all."""
    size = {"vocab_size": 96, "n_positions": 64, "n_embd": 512, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**size, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "plain")

    def shift(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("ln_1.bias", "ln_2.bias")):
                tensor[:] = 1
            elif name.endswith(".bias"):
                tensor[:] = 0
            elif name.endswith("c_attn.weight"):
                tensor += 0.02

    source = changed(tmp_path / "plain", tmp_path / "source", "bfloat16", shift)
    normconvert.convert(source, tmp_path / "output", "flashnorm", verify=False)
    found = normconvert.verify_equivalence(source, tmp_path / "output")
    assert found.equivalent


@pytest.mark.parametrize(("dtype", "everywhere"), [("float64", True), ("float32", False)])
def test_before_an_alarm_all_is_perturbed_if_computing_rounds_as_coarsely(
    dtype: str, everywhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the last norm alone is folded, all layers' noise is far more than its reader's."""

    def only_the_last_gain(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if name.endswith("layernorm.weight"):
                tensor[:] = 1

    source = changed(MODELS / "tiny-llama", tmp_path / "source", dtype, only_the_last_gain)
    normconvert.convert(source, tmp_path / "output", "flashnorm", verify=False)
    usual = normconvert.verify_equivalence(source, tmp_path / "output")
    assert usual.equivalent
    assert usual.dtype == "float64"
    assert usual.differing_tensors == 2
    monkeypatch.setattr(logits, "TIMES_FLOOR", 0)  # so that it looks like an alarm
    checked = normconvert.verify_equivalence(source, tmp_path / "output")
    for one, other in zip(usual.comparisons, checked.comparisons, strict=True):
        assert one.rms == other.rms
        assert (other.floor_rms > 3 * one.floor_rms) is everywhere


def test_infinity_has_no_noise() -> None:
    weight = torch.tensor([math.inf, -math.inf, 1.0], dtype=torch.float64).repeat(1000)
    found = perturbed(weight, torch.float64, torch.Generator().manual_seed(0))
    assert torch.equal(found[weight.isinf()], weight[weight.isinf()])
    assert not torch.equal(found, weight)
