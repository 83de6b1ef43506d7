"""OpenELM, which transformers does not have, against a forward pass in plain arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

import normconvert
import zoo
from command_line import run, run_here
from normconvert.precision import float64

SIZES: Mapping[str, Any] = {
    "vocab_size": 101,
    "model_dim": 54,
    "head_dim": 10,
    "num_transformer_layers": 3,
    "num_query_heads": [3, 6, 9],
    "num_kv_heads": [1, 3, 3],
    "ffn_multipliers": [0.5, 1.3, 2.1],
    "ffn_dim_divisor": 8,
    "max_context_length": 64,
    "rope_freq_constant": 1000,
}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "tied": {},
    "untied": {"share_input_output_layers": False},
    "no_gate": {"ffn_with_glu": False},
    "no_qk_norm": {"normalize_qk_projections": False, "share_input_output_layers": False},
}
IDS = torch.randint(3, 101, (3, 11), generator=torch.Generator().manual_seed(0))
# As the checkpoints have it: code of their own, which must not run.
AUTO_MAP = {
    "AutoConfig": "configuration_openelm.OpenELMConfig",
    "AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM",
}


def save(folder: Path, variant: str = "tied", dtype: torch.dtype = torch.float64) -> Path:
    config = transformers.AutoConfig.for_model("openelm", **{**SIZES, **VARIANTS[variant]})
    with torch.random.fork_rng(devices=[]):
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    zoo._randomise(model, torch.Generator().manual_seed(0))
    model.to(dtype).save_pretrained(folder)
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, "auto_map": AUTO_MAP}))
    for name in ("configuration_openelm.py", "modeling_openelm.py"):
        (folder / name).write_text("raise SystemExit('code of the checkpoint was run')\n")
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float64, attention: str = "eager") -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, trust_remote_code=False
    )
    return model.eval()


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad(), float64():
        found: torch.Tensor = load(folder)(IDS, use_cache=False).logits
    return found


def rms_norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * gain


def rotate(x: torch.Tensor, base: float) -> torch.Tensor:
    """x [batch, heads, length, size]: the i-th and the (i + size / 2)-th coordinate as a pair."""
    length, size = x.shape[-2:]
    angles = torch.arange(length, dtype=torch.float64)[:, None] * torch.tensor(
        [base ** (-2 * i / size) for i in range(size // 2)], dtype=torch.float64
    )
    first, second = x[..., : size // 2], x[..., size // 2 :]
    turned = (
        first * angles.cos() - second * angles.sin(),
        second * angles.cos() + first * angles.sin(),
    )
    return torch.cat(turned, dim=-1)


def reference(folder: Path) -> torch.Tensor:
    """The logits by plain arithmetic on the tensors of the file."""
    w, config = load_file(folder / "model.safetensors"), {**SIZES, "ffn_with_glu": True}
    config |= json.loads((folder / "config.json").read_text())
    size = config["head_dim"]
    x = w["transformer.token_embeddings.weight"][IDS]
    for i in range(config["num_transformer_layers"]):
        name = f"transformer.layers.{i}."
        queries, keys = config["num_query_heads"][i], config["num_kv_heads"][i]
        fused = rms_norm(x, w[name + "attn_norm.weight"]) @ w[name + "attn.qkv_proj.weight"].T
        heads = fused.unflatten(-1, (queries + 2 * keys, size)).transpose(1, 2)
        q, k, v = heads[:, :queries], heads[:, queries : queries + keys], heads[:, queries + keys :]
        if name + "attn.q_norm.weight" in w:
            q = rms_norm(q, w[name + "attn.q_norm.weight"])
            k = rms_norm(k, w[name + "attn.k_norm.weight"])
        q, k = (rotate(each, config["rope_freq_constant"]) for each in (q, k))
        k, v = (each.repeat_interleave(queries // keys, dim=1) for each in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(size)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        attended = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        attended = attended.transpose(1, 2).flatten(2)
        x = x + attended @ w[name + "attn.out_proj.weight"].T
        y = rms_norm(x, w[name + "ffn_norm.weight"]) @ w[name + "ffn.proj_1.weight"].T
        if config["ffn_with_glu"]:
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        else:
            y = F.silu(y)
        x = x + y @ w[name + "ffn.proj_2.weight"].T
    head = w.get("lm_head.weight", w["transformer.token_embeddings.weight"])
    found: torch.Tensor = rms_norm(x, w["transformer.norm.weight"]) @ head.T
    return found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_is_openelm(variant: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "source", variant)
    assert relative(logits(folder), reference(folder)) < 1e-12
    tensors = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in tensors) == ("share_input_output_layers" in VARIANTS[variant])
    assert len(tensors) == 2 + 3 * (6 if variant == "no_qk_norm" else 8) + (
        "lm_head.weight" in tensors
    )
    # 0.5 · 54 = 27, 1.3 · 54 = 70.2, 2.1 · 54 = 113.4, to multiples of 8.
    widths = [tensors[f"transformer.layers.{i}.ffn.proj_2.weight"].shape[1] for i in range(3)]
    assert widths == [24 + 8 * (24 < 0.9 * 27), 72, 112]


@pytest.mark.parametrize(
    ("multiplier", "divisor", "width"),
    [(4.0, 256, 8192), (0.5, 256, 1024), (0.07, 256, 256), (0.13, 64, 256), (180 / 2048, 128, 256)],
)
def test_the_width_of_the_feed_forward_network(multiplier: float, divisor: int, width: int) -> None:
    """Of 2048: to the nearest multiple, half up, and up if that is more than 10% down."""
    config: Any = transformers.AutoConfig.for_model(
        "openelm",
        model_dim=2048,
        num_transformer_layers=1,
        ffn_multipliers=[multiplier],
        ffn_dim_divisor=divisor,
    )
    assert config.ffn_width(0) == width
    assert width % divisor == 0
    assert width >= 0.9 * multiplier * 2048


def test_lists_need_an_entry_for_each_layer() -> None:
    with pytest.raises(ValueError, match="num_kv_heads has 2 entries for 3 layers"):
        transformers.AutoConfig.for_model("openelm", **{**SIZES, "num_kv_heads": [1, 3]})


@pytest.mark.parametrize("tied", ["keep", "untie"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_flashnorm(variant: str, tied: Any, tmp_path: Path) -> None:
    source, output = save(tmp_path / "source", variant), tmp_path / "output"
    conversion = normconvert.convert(source, output, tied=tied)
    assert conversion.status == "converted"
    untied = tied == "untie" or "share_input_output_layers" in VARIANTS[variant]
    folds = {
        name: "untied" if name == "transformer.norm" and not untied else "fold"
        for name in ("attn_norm", "ffn_norm", "transformer.norm")
    }
    for verdict in conversion.inspection.plan.verdicts:
        name = "transformer.norm" if verdict.norm == "transformer.norm" else verdict.norm[21:]
        assert verdict.action == ("fold" if folds.get(name) == "fold" else "keep"), verdict
        assert "rotary" in verdict.reason or name in folds
    assert relative(logits(output), logits(source)) < 1e-12
    assert relative(reference(output), reference(source)) < 1e-12
    for name in ("configuration_openelm.py", "modeling_openelm.py"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((output / "config.json").read_text())
    assert config["share_input_output_layers"] == (not untied)  # what its own code goes by, too
    assert config["auto_map"] == AUTO_MAP


def test_on_the_command_line(tmp_path: Path) -> None:
    save(tmp_path / "elm", dtype=torch.float32)
    result = run("flashnorm", "elm", cwd=tmp_path)
    assert (result.status, result.err) == (0, "")
    assert "Folded 6 of 13 norms" in result.out
    assert "Equivalent: " in result.out
    verified = run_here("verify-equivalence", "elm", "elm-flashnorm", cwd=tmp_path)
    assert verified.status == 0
    run_here("flashnorm", "elm", "--format", "native", "-o", "n", cwd=tmp_path).assert_refused(
        "elm", "--format stock"
    )


def test_generation(tmp_path: Path) -> None:
    """With a cache as without, with padding on the left, and in both attention implementations."""
    folder = save(tmp_path / "source", dtype=torch.float32)
    model = load(folder)
    found = [
        model.generate(IDS, max_new_tokens=9, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    ]
    assert torch.equal(*found)
    # In float64 eager attention knows no row that is masked altogether.
    models = [load(folder, torch.float32, attention) for attention in ("eager", "sdpa")]
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    with torch.no_grad():
        pair = [each(IDS, attention_mask=mask).logits[:, 4:] for each in models]
        short = models[0](IDS[:1, 4:]).logits
        last = model(IDS, logits_to_keep=1).logits
        whole = model(IDS).logits
        listed = model(IDS, logits_to_keep=torch.tensor([1, 5])).logits
    torch.testing.assert_close(listed, whole[:, [1, 5]], rtol=0, atol=1e-12)
    torch.testing.assert_close(*pair, rtol=0, atol=1e-4)
    torch.testing.assert_close(short, pair[0][:1], rtol=0, atol=1e-4)
    torch.testing.assert_close(last, whole[:, -1:], rtol=0, atol=1e-12)


def test_training(tmp_path: Path) -> None:
    """The loss has gradients in every parameter, with checkpointing as without."""
    model = load(save(tmp_path / "source", "untied"))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            new = getattr(model, "activation_checkpointing_enable", None)
            (new or model.gradient_checkpointing_enable)()  # the older name
        model.train()
        model.zero_grad()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(bool(gradient.any()) for gradient in gradients[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
