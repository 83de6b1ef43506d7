"""The zoo itself: a model on which a wrong fold could pass would make the other tests worthless."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

import zoo

BATCH, SEQUENCE = 2, 7
# Below this, a wrong gain could hide in the rounding of the norms that compute in float32.
FELT = 1e-3
WEIGHTLESS = {"olmo"}
# Config keys whose values must differ from one another wherever they occur together.
SIZE_KEYS = {
    "vocab_size",
    "vocab_size_per_layer_input",
    "hidden_size",
    "n_embd",
    "d_model",
    "hidden_size_per_layer_input",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "n_inner",
    "ffn_dim",
    "ffn_hidden_size",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "projection_dim",
    "pooler_output_size",
    "image_size",
    "num_channels",
    "num_mel_bins",
    "max_source_positions",
    "max_target_positions",
    "num_attention_heads",
    "n_head",
    "n_heads",
    "head_dim",
    "num_local_experts",
    "num_experts",
    "moe_num_experts",
    "n_routed_experts",
    "q_lora_rank",
    "kv_lora_rank",
    "v_head_dim",
    "qk_nope_head_dim",
    "adapter_rank",
    "laurel_rank",
}


@pytest.fixture(scope="module", params=list(zoo.ZOO))
def name(request: pytest.FixtureRequest) -> str:
    entry_name: str = request.param
    return entry_name


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(name)
    zoo.save(name, path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return zoo.load(folder)


@pytest.fixture(scope="module")
def reference(model: PreTrainedModel) -> torch.Tensor:
    return outputs(model)


def outputs(model: PreTrainedModel) -> torch.Tensor:
    return zoo.run(model, zoo.inputs(model, BATCH, SEQUENCE))


def gains(model: PreTrainedModel) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """Every norm gain, found by the name of the parameter or by the class that holds it."""
    found = {}
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        named = parameter.ndim == 1 and re.search(r"norm|ln_", name.lower())
        if name.endswith("weight") and (named or zoo.is_norm(module)):
            found[name] = (module, parameter)
    return found


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    shards = sorted(folder.glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def test_outputs_are_neither_degenerate_nor_wild(reference: torch.Tensor) -> None:
    if reference.ndim == 3:
        assert reference.shape == (BATCH, SEQUENCE, zoo.SIZES["vocab_size"])
    assert len(reference) == BATCH
    assert (reference[0] - reference[1]).std() > 1e-3
    assert reference.dtype == torch.float64
    assert reference.isfinite().all()
    for over in (*range(1, reference.ndim), tuple(range(reference.ndim))):
        spread = reference.std(over)
        assert spread.min() > 1e-3
        assert spread.max() < 1e3


def test_every_gain_is_felt(name: str, model: PreTrainedModel, reference: torch.Tensor) -> None:
    found = gains(model)
    assert bool(found) != (name in WEIGHTLESS)
    for path, (module, gain) in found.items():
        drawn = gain.detach().clone()
        nn.init.constant_(gain, zoo.identity_gain(module))
        change = outputs(model) - reference
        with torch.no_grad():
            gain.copy_(drawn)
        assert change.norm() > FELT * reference.norm(), path


def test_gains_are_random_and_their_convention_is_known(model: PreTrainedModel) -> None:
    lowest = 0.0
    for path, (module, gain) in gains(model).items():
        identity = zoo.identity_gain(module)
        effective = gain.detach() + (1.0 - identity)
        assert effective.abs().min() > 0.4, path
        lowest = min(lowest, effective.min().item())
        # At a gain of zero, only a norm that multiplies by 1 + w still depends on its input.
        drawn = gain.detach().clone()
        nn.init.zeros_(gain)
        with torch.no_grad():
            output = _call_norm(module, torch.randn(5, *gain.shape, dtype=gain.dtype))
            gain.copy_(drawn)
        assert (identity == 0.0) == bool(output.std(0).max() > 1e-6), path
    assert lowest < 0 or not gains(model)


def _call_norm(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = module(x, x) if "Gated" in type(module).__name__ else module(x)
    return output


def test_nothing_is_left_as_initialized(name: str, model: PreTrainedModel) -> None:
    fresh = dict(zoo.build(zoo.ZOO[name]).named_parameters())
    for path, parameter in model.named_parameters():
        assert (parameter != fresh[path].to(parameter.dtype)).all(), path
        assert (parameter != 0).all(), path
    for path, buffer in model.named_buffers():
        assert (buffer != 0).all() or "correction_bias" not in path, path


def test_sizes_tell_axes_apart(name: str, folder: Path, model: PreTrainedModel) -> None:
    config = json.loads((folder / "config.json").read_text())
    for nested in ("ffn_config", "text_config"):
        config |= config.get(nested, {})
    if "d_model" in config:  # DBRX repeats the hidden size
        config.pop("hidden_size", None)
    sizes = [config[key] for key in SIZE_KEYS & set(config) if config[key] is not None]
    flat = [size[0] if isinstance(size, list) else size for size in sizes]
    assert len(set(flat)) == len(flat)
    for path, parameter in model.named_parameters():
        assert not {BATCH, SEQUENCE, BATCH * SEQUENCE} & set(parameter.shape), path


def test_architecture_is_recorded(name: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(zoo.build(zoo.ZOO[name])).__name__]
    assert config["model_type"] == zoo.ZOO[name].model_type


def test_undeclared_keys_are_still_undeclared(name: str) -> None:
    entry = zoo.ZOO[name]
    assert zoo.undeclared(CONFIG_MAPPING[entry.model_type], entry.config) == set(entry.undeclared)


def test_unknown_key_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LlamaConfig has no .*num_query_value_heads"):
        zoo.make_config(zoo.Entry(model_type="llama", config={"num_query_value_heads": 3}))
    with pytest.raises(ValueError, match=r"DbrxConfig has no .*ffn_config\.top_k"):
        zoo.make_config(zoo.Entry(model_type="dbrx", config={"ffn_config": {"top_k": 3}}))


def test_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path)
    tensors = all_tensors(tmp_path)
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys.*model\.norm\.weight"):
        zoo.load(tmp_path)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_shards_hold_the_same_model(name: str, tmp_path: Path) -> None:
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    zoo.save(name, whole)
    zoo.save(name, sharded, max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert_same(all_tensors(whole), all_tensors(sharded))
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    tensors = all_tensors(sharded)
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert torch.equal(outputs(zoo.load(whole)), outputs(zoo.load(sharded)))


def test_prediction_layer_is_on_disk_only(tmp_path: Path) -> None:
    zoo.save("deepseek_v3", tmp_path)
    extra = {name for name in all_tensors(tmp_path) if name.startswith("model.layers.3.")}
    for leaf in ("eh_proj", "enorm", "hnorm", "shared_head.norm", "shared_head.head"):
        assert f"model.layers.3.{leaf}.weight" in extra
    assert "model.layers.3.mlp.experts.0.down_proj.weight" in extra
    assert not any(".3." in name for name, _ in zoo.load(tmp_path).named_modules())


def test_seed_decides_the_model_and_dtype_only_rounds_it(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path / "double")
    state = torch.get_rng_state()
    zoo.save("llama", tmp_path / "again")
    zoo.save("llama", tmp_path / "bf16", dtype="bfloat16")
    zoo.save("llama", tmp_path / "other", seed=1)
    assert torch.equal(state, torch.get_rng_state())
    double = all_tensors(tmp_path / "double")
    assert_same(double, all_tensors(tmp_path / "again"))
    assert_same(
        {name: tensor.to(torch.bfloat16) for name, tensor in double.items()},
        all_tensors(tmp_path / "bf16"),
    )
    assert not torch.equal(
        double["lm_head.weight"], all_tensors(tmp_path / "other")["lm_head.weight"]
    )


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name
