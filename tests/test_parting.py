"""Two models that are not the same: not equivalent, with the right place named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import normconvert
import zoo
from normconvert.cli.verdict import why
from normconvert.verify.layers import distances

Tensors = dict[str, torch.Tensor]


def perturb(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.02


def swap_layers(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        other = name.replace(".layers.1.", ".layers.2.")
        tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()


def nothing(tensors: Tensors) -> None:
    del tensors


def config(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.update(changes)


def fine_tune(tensors: Tensors) -> None:
    """A small step of every weight."""
    random = torch.Generator().manual_seed(1)
    for tensor in tensors.values():
        tensor += 1e-4 * torch.randn(tensor.shape, generator=random)


Case = tuple[Callable[[Tensors], None], Callable[[dict[str, Any]], None], str, str]
CASES: Mapping[str, Case] = {
    "one weight": (
        perturb,
        config(),
        "model.layers.1",
        "Of their weights these differ: model.layers.1.mlp.up_proj.weight.",
    ),
    "a fine-tune": (fine_tune, config(), "model.layers.0", ""),
    "swapped layers": (swap_layers, config(), "model.layers.1", ""),
    "another eps": (
        nothing,
        config(rms_norm_eps=1e-4),
        "model.layers.0",
        "Their configurations differ in rms_norm_eps.",
    ),
    "another rope base": (
        nothing,
        config(rope_parameters={"rope_type": "default", "rope_theta": 77.0}),
        "model.layers.0",
        "Their configurations differ in rope_parameters.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_first_layer_is_named(case: str, tmp_path: Path) -> None:
    change_tensors, change_config, place, note = CASES[case]
    zoo.save("llama", tmp_path / "one", dtype="float32")
    other = Path(shutil.copytree(tmp_path / "one", tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    change_tensors(tensors)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    document = json.loads((other / "config.json").read_text())
    change_config(document)
    (other / "config.json").write_text(json.dumps(document))
    report = normconvert.verify_equivalence(tmp_path / "one", other)
    assert not report.equivalent
    assert report.certificate is None
    assert report.algebra is None
    assert report.parts_at == place
    assert not note or note in report.notes
    assert [layer.module for layer in report.layers] == [f"model.layers.{i}" for i in range(3)]
    before = [layer for layer in report.layers if layer.module < place]
    assert all(layer.rms <= layer.floor for layer in before)


@pytest.mark.parametrize("rewrite", ["flashnorm", "rmsnorm", "crmsnorm"])
def test_equivalent_models_do_not_part(rewrite: Any, tmp_path: Path) -> None:
    """Not even where the stream has lost its mean, or a coordinate."""
    zoo.save("gpt2", tmp_path / "source", dtype="float32")
    normconvert.convert(tmp_path / "source", tmp_path / "output", rewrite, verify=False)
    report = normconvert.verify_equivalence(tmp_path / "source", tmp_path / "output")
    assert report.equivalent
    assert report.parts_at is None
    assert len(report.layers) == 3
    assert all(0 < layer.rms <= 4 * layer.floor for layer in report.layers)


def test_another_seed(tmp_path: Path) -> None:
    """The same architecture and configuration, other weights."""
    for seed in (1, 2):
        model = LlamaForCausalLM(zoo.make_config(zoo.ZOO["llama"]))
        zoo._randomise(model, torch.Generator().manual_seed(seed))
        model.save_pretrained(tmp_path / str(seed))
    report = normconvert.verify_equivalence(tmp_path / "1", tmp_path / "2")
    assert not report.equivalent
    assert report.parts_at == "model.layers.0"
    assert report.differing_tensors == len(load_file(tmp_path / "1" / "model.safetensors"))


def swap_tokens(tokenizer: dict[str, Any]) -> None:
    """Two that the text does not have."""
    vocabulary = tokenizer["model"]["vocab"]
    shipped = files("normconvert.verify").joinpath("text.txt").read_text(encoding="utf-8")
    one, other = [token for token in vocabulary if token.strip("Ġ▁ ") not in shipped][:2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def lose_capitals(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize("change", [swap_tokens, lose_capitals])
def test_another_tokenizer(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    """The weights are the same, and the models are not: the file is named."""
    source = Path(__file__).parents[1] / "models" / "tiny-llama"
    other = Path(shutil.copytree(source, tmp_path / "other"))
    assert normconvert.verify_equivalence(source, other).equivalent
    document = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(document))  # the same in other bytes
    assert normconvert.verify_equivalence(source, other).equivalent
    change(document)
    (other / "tokenizer.json").write_text(json.dumps(document))
    report = normconvert.verify_equivalence(source, other)
    assert not report.equivalent
    assert report.notes == ("Their tokenizers read text in different ways: tokenizer.json.",)
    assert why(report).endswith("but the tokenizers read text in different ways.")
    assert report.parts_at is None


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "models" / "tiny-llama"
    other = Path(shutil.copytree(source, tmp_path / "other"))
    (other / "tokenizer.json").unlink()
    report = normconvert.verify_equivalence(source, other)
    assert report.equivalent
    assert report.notes == (f"{other} has no tokenizer that loads; the other one has.",)
    assert why(report) == "no tensor differs, and the logits are the same."


def test_the_same_in_another_order(tmp_path: Path) -> None:
    """No tensor differs, and float64 rounds both: that is no difference either."""
    zoo.save("llama", tmp_path / "source", dtype="float32")
    normconvert.convert(tmp_path / "source", tmp_path / "output", "prmsnorm", fraction=1.0)
    report = normconvert.verify_equivalence(tmp_path / "source", tmp_path / "output")
    assert report.equivalent
    assert report.differing_tensors == 0
    assert all(0 < each.rms < 2 * each.floor_rms < 1e-12 for each in report.comparisons)
    assert why(report).endswith("what computing in another order does, for no tensor differs.")


def test_the_same_model_in_two_dtypes(tmp_path: Path) -> None:
    """Equal within the rounding of the coarser one."""
    zoo.save("llama", tmp_path / "float32", dtype="float32")
    zoo.save("llama", tmp_path / "bfloat16", dtype="bfloat16")
    report = normconvert.verify_equivalence(tmp_path / "float32", tmp_path / "bfloat16")
    assert report.equivalent
    assert report.dtype == "float64"
    assert all(comparison.max > 1e-6 for comparison in report.comparisons)


def test_distances() -> None:
    state = torch.randn(5, 8, dtype=torch.float64)
    shifted = state + 3
    free = state - state.mean(-1, keepdim=True)
    assert distances({"a": [state]}, {"a": [shifted]}, centered=False)["a"] == pytest.approx(3)
    for other in (shifted, free, free[:, :-1]):
        assert distances({"a": [state]}, {"a": [other]}, centered=True)["a"] < 1e-14
    assert distances({"a": [state]}, {"b": [state]}, centered=False) == {}
    assert distances({"a": [state]}, {"a": [state[:, :5]]}, centered=False)["a"] == float("inf")


def test_a_token_that_is_hardly_ever_read(tmp_path: Path) -> None:
    """Of 4001 rows of the embedding ten differ: then these tokens are read."""
    config = LlamaConfig(
        vocab_size=4001, hidden_size=54, intermediate_size=88, num_hidden_layers=1,
        num_attention_heads=9, num_key_value_heads=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "one")
    other = Path(shutil.copytree(tmp_path / "one", tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"][3990:4000] += 0.1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    report = normconvert.verify_equivalence(tmp_path / "one", other)
    assert not report.equivalent
    apart = {each.tokens: each.equivalent for each in report.comparisons}
    assert apart["differing tokens"] is False
    assert normconvert.verify_equivalence(other, other).equivalent


def test_what_no_input_reaches(tmp_path: Path) -> None:
    """The last positions of a table, on shorter texts: then nothing is shown, and it says so."""
    config = GPT2Config(vocab_size=96, n_positions=300, n_embd=54, n_layer=1, n_head=9)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "one")
    other = Path(shutil.copytree(tmp_path / "one", tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["transformer.wpe.weight"][200:] *= -1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    report = normconvert.verify_equivalence(tmp_path / "one", other)
    assert not report.equivalent
    assert all(each.max == 0 for each in report.comparisons)
    assert report.notes[-1] == "Of their weights these differ: transformer.wpe.weight."
    assert why(report).startswith("the differing tensor moved no bit of the logits")


def test_configurations_that_matter_elsewhere(tmp_path: Path) -> None:
    """Beyond as many positions as are compared, nothing is known: the report says so."""
    zoo.save("llama", tmp_path / "one", dtype="float32")
    other = Path(shutil.copytree(tmp_path / "one", tmp_path / "other"))
    document = json.loads((other / "config.json").read_text())
    document |= {"eos_token_id": 77, "transformers_version": "5.0.0"}
    (other / "config.json").write_text(json.dumps(document))
    report = normconvert.verify_equivalence(tmp_path / "one", other)
    assert report.equivalent
    assert "Their configurations differ in eos_token_id." in report.notes


def test_a_model_of_few_outputs(tmp_path: Path) -> None:
    """Two images of two classes: three perturbations may leave such a model where it is.

    They do so for this seed, of four that were tried.
    """
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ViTForImageClassification(
        ViTConfig(**sizes, intermediate_size=20, image_size=8, patch_size=2)
    )
    random: dict[str, Any] = {
        "generator": torch.Generator().manual_seed(3),
        "dtype": torch.float64,
    }
    for parameter in model.parameters():
        if parameter.ndim == 1:
            size = torch.rand(parameter.shape, **random) + 0.5
            negative = torch.rand(parameter.shape, generator=random["generator"]) < 0.4
            parameter.data = torch.where(negative, -size, size).float()
        else:
            parameter.data = (torch.randn(parameter.shape, **random) * 0.2 + 0.05).float()
    model.save_pretrained(tmp_path / "vit")
    conversion = normconvert.convert(tmp_path / "vit", tmp_path / "output", "crmsnorm")
    assert conversion.status == "converted"
