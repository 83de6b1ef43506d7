"""Conversions end to end: what folds, that it is exact, that it is rounded once, nothing else.

The tables say which norms must fold, from what the architectures compute; the oracle works with
whole numbers and fractions and shares no code with `normconvert.rewrite`.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

import normconvert
import zoo
from normconvert.ir.event import ignore
from normconvert.ir.expression import (
    AddProduct,
    Divide,
    Expression,
    Fill,
    Plus,
    Scale,
    Spread,
    Tensor,
)
from normconvert.ir.plan import Edit, Plan, Tied
from normconvert.model_inputs import trace_inputs
from normconvert.planner import make_plan
from normconvert.precision import float64
from normconvert.rewrite import write
from normconvert.source import open_checkpoint
from normconvert.trace import trace
from normconvert.verify import certify
from test_rounding import FORMATS, nearest

EXACT = 1e-12  # of the largest output, in float64
DTYPES = ("float32", "bfloat16", "float16")

# fold: the gain is 1. move: so it is, and the bias 0, moved on to biases of the readers.
# stay: the gain is 1, and bias / gain stays. keep: nothing changes. "if untied": else keep.
PRE = {
    "model.layers.*.input_layernorm": "fold",
    "model.layers.*.post_attention_layernorm": "fold",
}
HEAD = {"model.norm": "fold"}
TIED_HEAD = {"model.norm": "fold if untied"}
QK_NORM = {"model.layers.*.self_attn.q_norm": "keep", "model.layers.*.self_attn.k_norm": "keep"}
SANDWICH = {
    "model.layers.*.input_layernorm": "fold",
    "model.layers.*.post_attention_layernorm": "keep",
    "model.layers.*.pre_feedforward_layernorm": "fold",
    "model.layers.*.post_feedforward_layernorm": "keep",
}
GPT2 = {"transformer.h.*.ln_1": "move", "transformer.h.*.ln_2": "move"}
OPT = {
    "model.decoder.layers.*.self_attn_layer_norm": "move",
    "model.decoder.layers.*.final_layer_norm": "move",
}
OPT_POST_NORM = dict.fromkeys(OPT, "keep")
BLOOM = {
    "transformer.word_embeddings_layernorm": "keep",
    "transformer.h.*.input_layernorm": "move",
    "transformer.h.*.post_attention_layernorm": "move",
}
PERSIMMON = {
    "layers.*.input_layernorm": "move",
    "layers.*.self_attn.q_layernorm": "keep",
    "layers.*.self_attn.k_layernorm": "keep",
    "layers.*.post_attention_layernorm": "move",
    "final_layernorm": "stay",
}
# The encoder's last states are an output of the model, too.
ENCODER_DECODER = {
    "model.encoder.layers.*.self_attn_layer_norm": "move",
    "model.encoder.layers.*.final_layer_norm": "move",
    "model.encoder.layer_norm": "keep",
    "model.decoder.layers.*.self_attn_layer_norm": "move",
    "model.decoder.layers.*.encoder_attn_layer_norm": "move",
    "model.decoder.layers.*.final_layer_norm": "move",
    "model.decoder.layer_norm": "stay if untied",
}
CLIP = {"encoder.layers.*.layer_norm1": "move", "encoder.layers.*.layer_norm2": "move"}
NEOX = {
    "gpt_neox.layers.*.input_layernorm": "move",
    "gpt_neox.layers.*.post_attention_layernorm": "move",
    "gpt_neox.final_layer_norm": "stay",
}

EXPECTED: Mapping[str, Mapping[str, str]] = {
    "llama": PRE | HEAD,
    "llama_tied": PRE | TIED_HEAD,
    "mistral": PRE | HEAD,
    "qwen2": PRE | HEAD,
    "qwen3": PRE | QK_NORM | HEAD,
    "gemma": PRE | TIED_HEAD,
    "gemma2": SANDWICH | TIED_HEAD,
    "gemma3_text": SANDWICH | QK_NORM | TIED_HEAD,
    "gemma3n_text": SANDWICH
    | QK_NORM
    | TIED_HEAD
    | {
        # Laurel adds its input, the norm's output, to what it computes from it.
        "model.layers.*.input_layernorm": "keep",
        "model.layers.*.altup.router_norm": "fold",
        "model.layers.*.laurel.post_laurel_norm": "keep",
        "model.layers.*.self_attn.v_norm": "keep",
        "model.layers.*.post_per_layer_input_norm": "keep",
        "model.per_layer_projection_norm": "keep",
    },
    "phi3": PRE | HEAD,
    "granite": PRE | HEAD,
    "smollm3": PRE | TIED_HEAD,
    "olmo2": {
        "model.layers.*.post_attention_layernorm": "keep",
        "model.layers.*.post_feedforward_layernorm": "keep",
        **QK_NORM,
        **HEAD,
    },
    "glm4": {
        "model.layers.*.post_self_attn_layernorm": "keep",
        "model.layers.*.post_mlp_layernorm": "keep",
        **PRE,
        **HEAD,
    },
    "cohere": {"model.layers.*.input_layernorm": "fold", **TIED_HEAD},
    "cohere_qk_norm": {"model.layers.*.input_layernorm": "fold", **QK_NORM, **TIED_HEAD},
    "stablelm": {
        "model.layers.*.input_layernorm": "move",
        "model.layers.*.post_attention_layernorm": "stay",
        "model.norm": "stay",
    },
    "stablelm_parallel": {
        # Also read by the MLP, whose projections have no bias.
        "model.layers.*.input_layernorm": "stay",
        "model.layers.*.self_attn.q_layernorm.norms.*": "keep",
        "model.layers.*.self_attn.k_layernorm.norms.*": "keep",
        "model.norm": "stay",
    },
    "cohere2": {"model.layers.*.input_layernorm": "fold", **TIED_HEAD},
    "starcoder2": dict.fromkeys(PRE, "move") | {"model.norm": "stay if untied"},
    "gpt_neox": NEOX,
    "gpt_neox_sequential": NEOX,
    "gpt_neox_tied": NEOX | {"gpt_neox.final_layer_norm": "stay if untied"},
    "gpt2": GPT2 | {"transformer.ln_f": "stay if untied"},
    "gpt2_untied": GPT2 | {"transformer.ln_f": "stay"},
    "gpt_bigcode": GPT2 | {"transformer.ln_f": "stay if untied"},
    # Its projections of queries, keys and values have no bias.
    "gpt_neo": {
        "transformer.h.*.ln_1": "stay",
        "transformer.h.*.ln_2": "move",
        "transformer.ln_f": "stay if untied",
    },
    # Attention's projections have no bias, the output head has one.
    "gptj": {"transformer.h.*.ln_1": "stay", "transformer.ln_f": "move"},
    "codegen": {"transformer.h.*.ln_1": "stay", "transformer.ln_f": "move"},
    "opt": OPT | {"model.decoder.final_layer_norm": "stay if untied"},
    "opt_untied": OPT | {"model.decoder.final_layer_norm": "stay"},
    "opt_post_norm": OPT_POST_NORM | {"model.decoder.layers.2.final_layer_norm": "stay if untied"},
    # Read by a projection to the size of the embeddings, which is not tied.
    "opt_projected": OPT | {"model.decoder.final_layer_norm": "stay"},
    "opt_projected_post_norm": OPT_POST_NORM | {"model.decoder.layers.2.final_layer_norm": "stay"},
    "phi": {"model.layers.*.input_layernorm": "move", "model.final_layernorm": "move"},
    "persimmon": {f"model.{norm}": action for norm, action in PERSIMMON.items()},
    "fuyu": {f"model.language_model.{norm}": action for norm, action in PERSIMMON.items()},
    "bloom": BLOOM | {"transformer.ln_f": "stay if untied"},
    "bloom_untied": BLOOM | {"transformer.ln_f": "stay"},
    "bloom_post_norm_residual": dict.fromkeys(BLOOM, "keep")
    | {"transformer.ln_f": "stay if untied"},
    "mpt": {
        "transformer.blocks.*.norm_1": "fold",
        "transformer.blocks.*.norm_2": "fold",
        "transformer.norm_f": "fold if untied",
    },
    "biogpt": {
        "biogpt.layers.*.self_attn_layer_norm": "move",
        "biogpt.layers.*.final_layer_norm": "move",
        "biogpt.layer_norm": "stay if untied",
    },
    "xglm": {
        "model.layers.*.self_attn_layer_norm": "move",
        "model.layers.*.final_layer_norm": "move",
        "model.layer_norm": "stay if untied",
    },
    # Its linears add their bias in an operation of its own.
    "falcon": {"transformer.h.*.input_layernorm": "move", "transformer.ln_f": "stay if untied"},
    "falcon_new": {
        "transformer.h.*.ln_attn": "stay",
        "transformer.h.*.ln_mlp": "stay",
        "transformer.ln_f": "stay if untied",
    },
    "falcon_sequential": {
        "transformer.h.*.input_layernorm": "move",
        "transformer.h.*.post_attention_layernorm": "move",
        "transformer.ln_f": "stay if untied",
    },
    "nemotron": dict.fromkeys(PRE | HEAD, "stay"),
    "bert": {
        "bert.embeddings.LayerNorm": "keep",
        "bert.encoder.layer.*.attention.output.LayerNorm": "keep",
        "bert.encoder.layer.*.output.LayerNorm": "keep",
        # No layer follows whose residual would read it: only the head's dense projection does.
        "bert.encoder.layer.2.output.LayerNorm": "move",
        "cls.predictions.transform.LayerNorm": "move if untied",
    },
    "clip_text_model": CLIP | {"final_layer_norm": "keep"},
    "clip_vision_model": CLIP | {"pre_layrnorm": "keep", "post_layernorm": "keep"},
    "siglip_vision_model": CLIP | {"post_layernorm": "keep", "head.layernorm": "move"},
    "pegasus": ENCODER_DECODER,
    # Its keys have no bias.
    "whisper": ENCODER_DECODER
    | {
        "model.encoder.layers.*.self_attn_layer_norm": "stay",
        "model.decoder.layers.*.self_attn_layer_norm": "stay",
    },
    "vit": {
        "layers.*.layernorm_before": "move",
        "layers.*.layernorm_after": "move",
        "layernorm": "keep",
    },
    "vit_classifier": {
        "vit.layers.*.layernorm_before": "move",
        "vit.layers.*.layernorm_after": "move",
        "vit.layernorm": "move",
    },
    "dinov2": {
        "encoder.layer.*.norm1": "move",
        "encoder.layer.*.norm2": "move",
        "layernorm": "keep",
    },
    # The head reads the class token beside the mean of the others.
    "dinov2_classifier": {
        "dinov2.encoder.layer.*.norm1": "move",
        "dinov2.encoder.layer.*.norm2": "move",
        "dinov2.layernorm": "stay",
    },
    "mixtral": PRE | HEAD,
    "qwen3_moe": PRE | QK_NORM | HEAD,
    "qwen2_moe": PRE | HEAD,
    "qwen3_next": PRE | QK_NORM | HEAD,
    "deepseek_v3": {
        "model.layers.*.self_attn.q_a_layernorm": "fold",
        "model.layers.*.self_attn.kv_a_layernorm": "fold",
        **PRE,
        **HEAD,
    },
    "deepseek_v3_no_q_latent": {
        "model.layers.*.self_attn.kv_a_layernorm": "fold",
        **PRE,
        **HEAD,
    },
    "gpt_oss": PRE | HEAD,
    "phimoe": {
        "model.layers.*.input_layernorm": "move",
        "model.layers.*.post_attention_layernorm": "stay",
        "model.norm": "move",
    },
    "dbrx": {
        "transformer.blocks.*.norm_attn_norm.norm_1": "fold",
        "transformer.blocks.*.norm_attn_norm.norm_2": "fold",
        "transformer.norm_f": "fold",
    },
    "granitemoe": PRE | HEAD,
    # The residual is taken after its pre-norms; the norm inside lightning attention may fold.
    "minimax": dict.fromkeys(PRE, "keep") | {"model.layers.*.self_attn.norm": "fold"} | HEAD,
    "zamba2": {
        "model.layers.*.input_layernorm": "fold",
        "model.layers.*.shared_transformer.input_layernorm": "fold",
        "model.layers.*.shared_transformer.pre_ff_layernorm": "fold",
        "model.layers.*.mamba_decoder.input_layernorm": "fold",
        "model.final_layernorm": "fold if untied",
    },
}
REFUSED = {"olmo": normconvert.PlanError}

IS_TIED = {name for name, norms in EXPECTED.items() if any("untied" in n for n in norms.values())}
# Post-norm, and a tied head: there is nothing to fold.
ALL_KEPT = {"opt_post_norm", "bloom_post_norm_residual"}
CASES: list[tuple[str, Tied]] = [(name, "keep") for name in EXPECTED if name not in ALL_KEPT]
CASES += [(name, "untie") for name in sorted(IS_TIED)]
SHARDED = {"llama", "gemma2", "gpt2", "mixtral", "deepseek_v3", "gpt_oss", "zamba2"}
OTHER_FILES = {
    "LICENSE": b"Do what you like.\n",
    "chat_template.jinja": b"{{ messages }}\r\n",
    "custom/modeling_x.py": b"raise SystemExit\n",
    "tokens.bin": bytes(range(256)),
}


def save(name: str, folder: Path, dtype: str = "float64") -> None:
    zoo.save(name, folder, dtype=dtype, max_shard_size="150KB" if name in SHARDED else "5GB")
    for path, content in OTHER_FILES.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)


def expectation(name: str, norm: str, tied: Tied) -> str:
    """What must happen to the norm called `norm`; its own line in the table comes first."""
    table = EXPECTED[name]
    found = table.get(norm) or table[re.sub(r"\.\d+(?=\.|$)", ".*", norm)]
    action, _, condition = found.partition(" if ")
    return action if not condition or tied == "untie" else "keep"


def outputs(model: Any) -> torch.Tensor:
    """Neither the batch nor the length is the one that a model is traced with."""
    return zoo.run(model, zoo.inputs(model, 3, 11))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    shards = sorted(folder.glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def test_every_architecture_has_its_table() -> None:
    assert set(EXPECTED) | set(REFUSED) == set(zoo.ZOO)


@pytest.mark.parametrize("name", [*REFUSED, *sorted(ALL_KEPT)])
def test_refused(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / "source")
    expected = REFUSED.get(name, normconvert.PlanError)
    with pytest.raises(expected) as error:
        normconvert.convert(tmp_path / "source", tmp_path / "output")
    assert type(error.value) is expected
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_without_its_head_a_model_returns_its_last_norm(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    plan = normconvert.inspect(tmp_path).plan
    assert [verdict.norm for verdict in plan.verdicts if verdict.action == "keep"] == ["norm"]
    assert "lm_head.weight" not in {edit.tensor for edit in plan.edits}


@pytest.mark.parametrize(("name", "tied"), CASES)
def test_exact(name: str, tied: Tied, tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    save(name, source)
    conversion = normconvert.convert(source, output, tied=tied, verify=False)
    assert conversion.status == "converted"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "source"]
    plan = conversion.inspection.plan
    check_verdicts(name, tied, plan)
    check_files(source, output, plan)
    check_tensors(source, output, plan)
    original, converted = zoo.load(source), zoo.load(output)
    check_norms(name, tied, plan, original, converted)
    with float64():
        before, after = outputs(original), outputs(converted)
    assert before.dtype == after.dtype == torch.float64
    assert (after - before).abs().max() <= EXACT * before.abs().max()


def check_verdicts(name: str, tied: Tied, plan: Plan) -> None:
    found = {verdict.norm: verdict.action for verdict in plan.verdicts}
    expected = {norm: expectation(name, norm, tied) for norm in found}
    assert found == {n: "keep" if e == "keep" else "fold" for n, e in expected.items()}
    patterns = {re.sub(r"\.\d+(?=\.|$)", ".*", norm) for norm in found}
    assert {*patterns, *found} >= set(EXPECTED[name])
    assert all(verdict.reason for verdict in plan.verdicts)


def check_norms(name: str, tied: Tied, plan: Plan, original: Any, converted: Any) -> None:
    """Folded gains are at the value at which the module only normalizes."""
    for verdict in plan.verdicts:
        action = expectation(name, verdict.norm, tied)
        before, after = (m.get_submodule(verdict.norm) for m in (original, converted))
        tensors = dict(after.named_parameters())
        if action == "keep":
            for leaf, tensor in before.named_parameters():
                assert torch.equal(tensor, tensors[leaf]), verdict.norm
            continue
        identity = zoo.identity_gain(before)
        assert (after.weight == identity).all(), verdict.norm
        assert ("bias" in tensors) == (action != "fold"), verdict.norm
        if action == "move":
            assert (after.bias == 0).all(), verdict.norm
        if action == "stay":
            gain = before.weight + (1.0 - identity)
            assert torch.equal(after.bias, before.bias / gain), verdict.norm


def check_files(source: Path, output: Path, plan: Plan) -> None:
    """The same files with the same bytes, but for weights and what untying must change."""
    before, after = files(source), files(output)
    assert set(after) == {*before, "normconvert.json"}
    added = {edit.tensor for edit in plan.edits} - set(stored(source))
    changed = {path for path in before if before[path] != after[path]}
    changed -= {path for path in changed if path.endswith(".safetensors")}
    if not added:
        assert not changed
        return
    config, index = "config.json", "model.safetensors.index.json"
    assert changed == {config} | ({index} & set(before))
    assert json.loads(before[config]) | {"tie_word_embeddings": False} == json.loads(after[config])
    if index in before:
        old, new = json.loads(before[index]), json.loads(after[index])
        assert new["weight_map"] == {
            name: shard.name for shard in output.glob("*.safetensors") for name in load_file(shard)
        }
        size = sum(tensor.nbytes for tensor in stored(output).values())
        assert new["metadata"] == old["metadata"] | {"total_size": size}


def check_tensors(source: Path, output: Path, plan: Plan) -> None:
    """Every shard has its tensors in their order, and all without an edit have their bytes."""
    edited = {edit.tensor for edit in plan.edits}
    added = sorted(edited - set(stored(source)))
    found: list[list[str]] = []
    for shard in source.glob("*.safetensors"):
        old, new = entries(shard), entries(output / shard.name)
        assert list(new)[: len(old)] == list(old)
        found.append(sorted(list(new)[len(old) :]))
        for name, entry in old.items():
            if name == "__metadata__":
                assert new[name] == entry
                continue
            assert (new[name]["dtype"], new[name]["shape"]) == (entry["dtype"], entry["shape"])
            assert (new[name]["bytes"] == entry["bytes"]) == (name not in edited), name
    assert max(found) == added  # all in one shard


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def entries(shard: Path) -> dict[str, Any]:
    """A safetensors file's header in the order of its bytes, with the bytes of each tensor."""
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    metadata = {"__metadata__": header.pop("__metadata__", None)}
    for entry in header.values():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        entry["bytes"] = content[start:stop]
    return metadata | dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))


# --- rounding --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPECTED)
def test_rounded_once_and_verified(name: str, tmp_path: Path) -> None:
    """The model is traced once for all dtypes: that is most of a conversion's time."""
    save(name, tmp_path / "float32", "float32")
    graph = trace(open_checkpoint(str(tmp_path / "float32")))
    for dtype in DTYPES:
        source, output = tmp_path / dtype, tmp_path / f"{dtype}-output"
        if dtype != "float32":
            save(name, source, dtype)
        checkpoint = open_checkpoint(str(source))
        plan = make_plan(graph, checkpoint, ("flashnorm",), tied="untie")
        output.mkdir()
        write(plan, checkpoint, output, {"plan": plan.to_json()}, ignore)
        check_tensors(source, output, plan)
        check_rounding(source, output, plan)
        certificate = certify(plan, checkpoint, open_checkpoint(str(output)), ignore)
        assert certificate.valid, certificate.problems
        assert certificate.undecided == 0
        (output / "normconvert.json").unlink()
        assert normconvert.verify_equivalence(source, output).equivalent, dtype


@pytest.mark.parametrize(
    ("weights", "norms"),
    [
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float32", "bfloat16"),
        ("float16", "bfloat16"),
        ("bfloat16", "float16"),
    ],
)
@pytest.mark.parametrize("name", ["gemma", "gpt2", "stablelm", "mixtral"])
def test_rounded_once_in_mixed_dtypes(name: str, weights: str, norms: str, tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    zoo.save(name, source)
    tensors = {
        path: tensor.to(getattr(torch, norms if re.search(r"norm|ln_", path) else weights))
        for path, tensor in stored(source).items()
    }
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    conversion = normconvert.convert(source, output, tied="untie", verify=False)
    check_tensors(source, output, conversion.inspection.plan)
    check_rounding(source, output, conversion.inspection.plan)


@pytest.mark.parametrize(
    ("name", "weights", "norms", "weight", "gain"),
    [
        # 24 bits times the 40 of 1 + w, next to a tie that float64 cannot tell it from.
        ("gemma", "float32", "float32", "0x1.00036ep+0", "0x1.30fbeap-16"),
        # In float32 the product rounds to a tie of bfloat16's subnormals, below which it is not.
        ("llama", "bfloat16", "float32", "0x1.2p-130", "0x1.1c72p-2"),
        # Ties, and products next to one, down to the subnormals.
        ("llama", "float16", "float16", "0x1.804p+0", "0x1.8p+0"),
        ("llama", "float16", "float16", "0x1.008p-15", "0x1p-1"),
        ("llama", "bfloat16", "bfloat16", "0x1.82p+0", "0x1.7ep+0"),
        ("llama", "bfloat16", "float32", "0x1.02p+0", "0x1.01fc08p+0"),
        ("llama", "float32", "float32", "0x1.000002p-120", "-0x1.8p-29"),
    ],
)
def test_planted_values_are_rounded_once(
    name: str, weights: str, norms: str, weight: str, gain: str, tmp_path: Path
) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    zoo.save(name, source)
    tensors = {
        path: tensor.to(getattr(torch, norms if "norm" in path else weights))
        for path, tensor in stored(source).items()
    }
    planted = [
        ("model.layers.0.input_layernorm.weight", gain, (slice(None),)),
        ("model.layers.0.self_attn.q_proj.weight", weight, (slice(None, None, 2), slice(None))),
    ]
    for path, number, where in planted:
        tensors[path][where] = float.fromhex(number)
        assert float(tensors[path].flatten()[0]) == float.fromhex(number)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    plan = normconvert.convert(source, output, verify=False).inspection.plan
    check_rounding(source, output, plan)


def check_rounding(source: Path, output: Path, plan: Plan) -> None:
    """Every edited tensor has, bit for bit, the exact value rounded once to its dtype."""
    before, after = stored(source), stored(output)
    for edit in plan.edits:
        found = after[edit.tensor]
        match edit.expression:
            case Fill(value):
                assert (found == value).all(), edit.tensor
            case Tensor(name):
                assert torch.equal(found, before[name]), edit.tensor
            case AddProduct():
                check_sum(edit.expression, before, found)
            case Scale(Tensor(name), axis, by):
                check_product(before[name], axis, vector(by, before), found)
            case _:
                exact = vector(edit.expression, before)
                assert found.tolist() == [nearest(number, found.dtype) for number in exact]


def vector(expression: Expression, tensors: Mapping[str, torch.Tensor]) -> list[Fraction]:
    match expression:
        case Tensor(name):
            return [Fraction(number) for number in tensors[name].flatten().tolist()]
        case Plus(of, number):
            return [element + Fraction(number) for element in vector(of, tensors)]
        case Divide(of, by):
            pairs = zip(vector(of, tensors), vector(by, tensors), strict=True)
            return [one / other if one else Fraction(0) for one, other in pairs]
        case Spread(of, runs):
            elements = vector(of, tensors)
            return [
                element
                for start, stop in runs
                for element in (elements[start:stop] if start >= 0 else [Fraction(1)] * stop)
            ]
    raise AssertionError(expression)


def check_sum(
    expression: AddProduct, tensors: Mapping[str, torch.Tensor], found: torch.Tensor
) -> None:
    """c + W b within what float64 sums allow: where that straddles a tie, two results are right."""
    assert isinstance(expression.matrix, Tensor)
    assert isinstance(expression.vector, Tensor)
    matrix, bias = tensors[expression.matrix.name], tensors[expression.vector.name]
    weights, biases = whole(matrix.transpose(1 - expression.axis, 0)), whole(bias)
    added = [int(first * 2**300) for first in vector(expression.of, tensors)]
    exact, size = added + weights @ biases, np.abs(added) + np.abs(weights) @ np.abs(biases)
    for total, most, result in zip(exact, size, found.tolist(), strict=True):
        error = Fraction(most * (len(biases) + 1), 2**353)
        near = Fraction(total, 2**300)
        assert nearest(near - error, found.dtype) <= result <= nearest(near + error, found.dtype)


def whole(numbers: torch.Tensor) -> Any:
    """Numbers of at most 32 bits as Python's whole numbers, times 2**150, to multiply exactly."""
    scaled = numbers.to(torch.float64).ldexp(torch.tensor(150.0))
    return np.frompyfunc(int, 1, 1)(scaled.numpy())


def check_product(
    weight: torch.Tensor, axis: int, gain: list[Fraction], found: torch.Tensor
) -> None:
    """W along `axis` times the gain. Whole numbers of 62 bits are exact; the rest in fractions."""
    fmt = FORMATS[found.dtype]
    weights = np.moveaxis(weight.to(torch.float64).numpy(), axis, -1)
    results = np.moveaxis(found.to(torch.float64).numpy(), axis, -1)
    fraction, exponent = np.frexp(weights)
    mantissa = np.ldexp(fraction, 24).astype(np.int64)
    power = [-(number.denominator.bit_length() - 1) for number in gain]
    whole = [number.numerator for number in gain]
    fits = np.array([abs(number) < 1 << 38 for number in whole])
    for column in np.flatnonzero(~fits):
        pairs = zip(weights[..., column].ravel(), results[..., column].ravel(), strict=True)
        for one, result in pairs:
            assert nearest(Fraction(float(one)) * gain[column], found.dtype) == result
    product = (mantissa * np.where(fits, np.array(whole, dtype=object), 0).astype(np.int64))[
        ..., fits
    ]
    unit = (exponent - 24 + np.array(power))[..., fits]
    size, bits = np.abs(product), np.frexp(product.astype(np.longdouble))[1]
    last = np.maximum(bits + unit - fmt.precision, fmt.lowest)
    shift = np.clip(last - unit, 0, 62)
    count, rest = size >> shift, size & ((1 << shift) - 1)
    half = np.where(shift > 0, 1 << np.maximum(shift - 1, 0), 1)
    count += (rest > half) | ((rest == half) & (count % 2 == 1))
    expected = np.ldexp((np.sign(product) * count).astype(np.float64), unit + shift)
    assert (expected == results[..., fits]).all()


# --- the witness -----------------------------------------------------------------------------


def dropped(plan: Plan, random: Random) -> list[Edit]:
    """One reader is left as it was."""
    victim = random.choice(scaled(plan))
    return [edit for edit in plan.edits if edit is not victim]


def rolled(plan: Plan, random: Random) -> list[Edit]:
    """One reader takes its gain one element too far."""
    victim = random.choice(scaled(plan))
    size = victim.shape[victim.expression.axis]
    return with_gain(plan, victim, lambda gain: Spread(gain, ((1, size), (0, 1))))


def swapped(plan: Plan, random: Random) -> list[Edit]:
    """One reader takes the gain of another norm."""
    pairs = [
        (victim, other.expression.by)
        for victim in scaled(plan)
        for other in scaled(plan)
        if victim.expression.by != other.expression.by
        and victim.shape[victim.expression.axis] == other.shape[other.expression.axis]
    ]
    victim, gain = random.choice(pairs)
    return with_gain(plan, victim, lambda _: gain)


def emptied(plan: Plan, random: Random) -> list[Edit]:
    """One gain is 1, and no reader has it."""
    readers = random.choice(plan.folded).readers
    return [edit for edit in plan.edits if edit.tensor not in readers]


def forgotten(plan: Plan, random: Random) -> list[Edit]:
    """One bias is 0, or not divided, and a reader lacks it."""
    biases = [e for e in plan.edits if isinstance(e.expression, (AddProduct, Divide))]
    victim = random.choice(biases)
    return [edit for edit in plan.edits if edit is not victim]


Sabotage = Callable[[Plan, Random], list[Edit]]


def scaled(plan: Plan) -> list[Any]:
    return [edit for edit in plan.edits if isinstance(edit.expression, Scale)]


def with_gain(plan: Plan, victim: Edit, change: Callable[[Expression], Expression]) -> list[Edit]:
    assert isinstance(victim.expression, Scale)
    expression = replace(victim.expression, by=change(victim.expression.by))
    return [replace(e, expression=expression) if e is victim else e for e in plan.edits]


SABOTAGE = (dropped, rolled, swapped, emptied, forgotten)
WITNESSED = {
    "llama": "float32",
    "gemma": "bfloat16",
    "mixtral": "float32",
    "gpt2": "bfloat16",
    "falcon": "float16",
    "siglip_vision_model": "float32",
    "whisper": "bfloat16",
}
BROKEN = [
    (name, sabotage)
    for name in WITNESSED
    for sabotage in SABOTAGE
    if sabotage is not forgotten or {"move", "stay"} & set(EXPECTED[name].values())
]


@pytest.mark.parametrize(("name", "sabotage"), BROKEN)
def test_sabotage_is_noticed(name: str, sabotage: Sabotage, tmp_path: Path) -> None:
    assert all(noticed(name, WITNESSED[name], sabotage, tmp_path))


def noticed(name: str, dtype: str, sabotage: Sabotage, folder: Path) -> list[bool]:
    """Whether comparing logits rejects what some broken plans write."""
    source = folder / "source"
    save(name, source, dtype)
    checkpoint = open_checkpoint(str(source))
    plan = make_plan(trace(checkpoint), checkpoint, ("flashnorm",))
    found = []
    for seed in range(2):
        edits = tuple(sabotage(plan, Random(seed)))
        assert edits != plan.edits
        output = folder / str(seed)
        output.mkdir()
        write(replace(plan, edits=edits), checkpoint, output, {}, ignore)
        (output / "normconvert.json").unlink()
        found.append(not normconvert.verify_equivalence(source, output).equivalent)
    return found


@pytest.mark.parametrize(
    ("name", "compared"),
    [
        ("whisper", ["spectra"]),
        ("pegasus", ["random", "token by token"]),
        ("clip_text_model", ["random", "random, pooled"]),
        ("clip_vision_model", ["images", "images, pooled"]),
        ("vit_classifier", ["images"]),
    ],
)
def test_models_are_compared_on_what_they_read(
    name: str, compared: list[str], tmp_path: Path
) -> None:
    zoo.save(name, tmp_path, dtype="float32")
    found = normconvert.verify_equivalence(tmp_path, tmp_path)
    assert found.equivalent
    assert [comparison.tokens for comparison in found.comparisons] == compared
    assert bool(found.notes) == (compared[0] == "random")  # there is no tokenizer


def test_what_is_pooled_is_compared(tmp_path: Path) -> None:
    """The last hidden states of a CLIP tower are read before its last norm."""
    original, other = tmp_path / "original", tmp_path / "other"
    for folder in (original, other):
        zoo.save("clip_vision_model", folder, dtype="float32")
    tensors = stored(other)
    tensors["post_layernorm.bias"] *= 1.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    found = normconvert.verify_equivalence(original, other)
    assert [(each.tokens, each.max > 0) for each in found.comparisons] == [
        ("images", False),
        ("images, pooled", True),
    ]
    assert not found.equivalent


def test_other_outputs_are_refused(tmp_path: Path) -> None:
    bare, headed = tmp_path / "bare", tmp_path / "headed"
    zoo.save("vit", bare, dtype="float32")
    zoo.save("vit_classifier", headed, dtype="float32")
    with pytest.raises(normconvert.VerificationError, match=r"outputs have different shapes"):
        normconvert.verify_equivalence(bare, headed)


class Reads(torch.nn.Module):
    """A model of a kind of input that is not known."""

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        return input_values


class Sees(torch.nn.Module):
    """A model of images whose size its config does not say."""

    config = PreTrainedConfig()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Reads(), "Reads reads no input_ids, input_features or pixel_values"),
        (Sees(), "The config of Sees has no image_size"),
    ],
)
def test_unknown_inputs_are_refused(model: Any, message: str) -> None:
    with pytest.raises(normconvert.TraceError, match=message):
        trace_inputs(model, 2, 7)


@pytest.mark.parametrize("can", ["all of it", "a part", "nothing", "not here"])
def test_what_the_kernel_does_not_copy(
    can: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long unchanged runs are copied by the system as far as it does that; the rest is written."""
    model = Path(__file__).parents[1] / "models" / "tiny-llama"
    normconvert.convert(model, tmp_path / "expected", verify=False)
    monkeypatch.setattr("normconvert.rewrite.writer.BLOCK_BYTES", 1 << 12)
    copy, copied = os.copy_file_range, 0

    def limited(source: int, target: int, count: int, *offsets: int) -> int:
        nonlocal copied
        if can == "not here":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        if can == "nothing" or (can == "a part" and copied):
            return 0
        count = copy(source, target, count if can == "all of it" else 1000, *offsets)
        copied += count
        return count

    monkeypatch.setattr("os.copy_file_range", limited)
    normconvert.convert(model, tmp_path / "output", verify=False)
    assert (copied > 0) == (can in ("all of it", "a part"))
    expected = (tmp_path / "expected" / "model.safetensors").read_bytes()
    assert (tmp_path / "output" / "model.safetensors").read_bytes() == expected
