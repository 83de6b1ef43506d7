"""Two models that are not the same: not equivalent, with the right place named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import normconvert
import zoo
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


CASES: Mapping[str, tuple[Callable[[Tensors], None], Callable[[dict[str, Any]], None], str]] = {
    "one weight": (perturb, config(), "model.layers.1"),
    "swapped layers": (swap_layers, config(), "model.layers.1"),
    "another eps": (nothing, config(rms_norm_eps=1e-4), "model.layers.0"),
    "another rope base": (
        nothing,
        config(rope_parameters={"rope_type": "default", "rope_theta": 77.0}),
        "model.layers.0",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_first_layer_is_named(case: str, tmp_path: Path) -> None:
    change_tensors, change_config, place = CASES[case]
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
