"""Retargeting: a centered checkpoint as one of another architecture, or the reason why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PhiConfig, PhiForCausalLM

import normconvert
import zoo
from command_line import run_here
from normconvert.errors import PlanError
from normconvert.ir.graph import Node
from normconvert.precision import float64
from normconvert.retarget import twin
from normconvert.retarget.constants import constants, skeleton
from normconvert.retarget.proof import Side, difference, needed
from normconvert.source import open_checkpoint
from normconvert.trace import trace
from zoo_entry import Entry

EXACT = 1e-12  # of the largest logit, in float64
VARIANTS = {
    "olmo": Entry(model_type="olmo"),
    "olmo_4_layers": Entry(model_type="olmo", config={"num_hidden_layers": 4}),
    "olmo_biases": Entry(model_type="olmo", config={"attention_bias": True}),
    "olmo_tied": Entry(model_type="olmo", config={"tie_word_embeddings": True}),
    "olmo_clipped": Entry(model_type="olmo", config={"clip_qkv": 8.0}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """The folder of a model of the zoo or of a variant, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "ZOO", {**zoo.ZOO, **VARIANTS})

        def model(name: str) -> Path:
            if not (folder / name).exists():
                zoo.save(name, folder / name)
            return folder / name

        yield model


def become(model: Path, output: Path, target: str, **options: Any) -> Path:
    """The output of `rmsnorm --target`, which must be written."""
    done = normconvert.convert(model, output, "rmsnorm", target=target, verify=False, **options)
    assert done.status == "converted"
    return output


def logits(folder: Path) -> torch.Tensor:
    """As any user of transformers would get them, in exact arithmetic."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    ids = torch.arange(4, 46).reshape(3, 14)
    with torch.no_grad(), float64():
        found: torch.Tensor = model(ids).logits
    return found


def assert_same(model: Path, output: Path) -> None:
    expected = logits(model)
    assert (logits(output) - expected).abs().max() <= EXACT * expected.abs().max()


def test_an_olmo_becomes_a_plain_llama(models: Callable[[str], Path], tmp_path: Path) -> None:
    model = models("olmo")
    done = normconvert.convert(model, tmp_path / "llama", "rmsnorm", target="llama")
    assert done.status == "converted"
    assert done.verification is not None
    assert done.verification.equivalent
    assert sorted(path.name for path in (tmp_path / "llama").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "normconvert.json",
    ]
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    before = json.loads((model / "config.json").read_text())
    assert config == {
        **{key: value for key, value in before.items() if key != "clip_qkv"},
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "rms_norm_eps": 1e-5,
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert type(loaded) is transformers.LlamaForCausalLM
    stored = load_file(tmp_path / "llama" / "model.safetensors")
    new = stored.keys() - load_file(model / "model.safetensors").keys()
    assert len(new) == 7
    for name in new:
        assert torch.equal(stored[name], torch.ones(54, dtype=torch.float64))
    assert_same(model, tmp_path / "llama")


@pytest.mark.parametrize(
    ("name", "target", "options"),
    [
        ("olmo", "smollm3", {}),  # of its layers only every fourth has no rotary embedding
        ("olmo_biases", "llama", {}),
        ("olmo_tied", "llama", {"tied": "untie"}),
    ],
)
def test_others_too(
    models: Callable[[str], Path], tmp_path: Path, name: str, target: str, options: dict[str, Any]
) -> None:
    output = become(models(name), tmp_path / "output", target, **options)
    assert json.loads((output / "config.json").read_text())["model_type"] == target
    assert_same(models(name), output)


def test_shards_and_narrow_dtypes(tmp_path: Path) -> None:
    zoo.save("olmo", tmp_path / "olmo", dtype="bfloat16", max_shard_size="80KB")
    output = become(tmp_path / "olmo", tmp_path / "llama", "llama")
    shards = sorted(path.name for path in (tmp_path / "olmo").glob("*.safetensors"))
    assert len(shards) > 1
    assert sorted(path.name for path in output.glob("*.safetensors")) == shards
    stored = {n: t for shard in shards for n, t in load_file(output / shard).items()}
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stored.keys()
    assert "model.norm.weight" in stored
    logits(output)


def test_what_the_config_leaves_out_is_the_default_of_its_own_type(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(models("olmo"), tmp_path / "olmo"))
    config = json.loads((model / "config.json").read_text())
    del config["eos_token_id"], config["rope_parameters"]
    config |= {"rope_theta": 500.0, "my_own": {"key": 1}}  # as files of transformers 4 have it
    (model / "config.json").write_text(json.dumps(config))
    output = become(model, tmp_path / "llama", "llama")
    written = json.loads((output / "config.json").read_text())
    assert written["eos_token_id"] == transformers.OlmoConfig().eos_token_id
    assert written["eos_token_id"] != transformers.LlamaConfig().eos_token_id
    assert (written["rope_theta"], written["my_own"]) == (500.0, {"key": 1})
    assert_same(model, output)


@pytest.mark.parametrize(
    ("name", "target", "options", "words"),
    [
        ("olmo_clipped", "llama", {}, ["clamp(min=-8.0, max=8.0)", "clip_qkv (8.0)"]),
        ("olmo_4_layers", "smollm3", {}, ["add in model.layers.3.self_attn"]),
        ("olmo_tied", "llama", {}, ["give --tied untie"]),
        ("olmo", "olmo", {}, ["rmsnorm", "layernorm", "model.layers.0.input_layernorm"]),
        ("olmo", "gpt2", {}, ["transformer.wte.weight"]),
        ("olmo", "mistral", {}, ["bitwise_and"]),  # its window
        ("olmo", "qwen2", {}, ["model.layers.0.self_attn.k_proj.bias"]),
        ("olmo", "granite", {}, ["mul(other=0.4082482904639)"]),
        ("olmo", "olmo2", {}, ["post_attention_layernorm"]),
        ("olmo", "gemma", {}, ["has shape", "GemmaForCausalLM with this config.json needs"]),
        ("olmo", "mamba2", {}, ["Mamba2Config"]),
        ("olmo", "llma", {}, ["model_type 'llma'", "such as llama"]),
        ("olmo", "vit", {}, ["no causal language model"]),
        ("cohere", "llama", {"tied": "untie"}, ["mul(other=0.0625)"]),
        ("llama", "llama", {}, ["it is no LayerNorm"]),
    ],
)
def test_refused_with_the_reason(
    models: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    target: str,
    options: dict[str, Any],
    words: list[str],
) -> None:
    tied = ["--tied", options["tied"]] if options else []
    done = run_here("rmsnorm", models(name), "--target", target, *tied, cwd=tmp_path)
    done.assert_refused(*words)
    assert not list(tmp_path.iterdir())


def test_only_rmsnorm_in_the_stock_format_of_an_original(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    def refused(model: Path, words: str, rewrite: Any = "rmsnorm", **options: Any) -> None:
        with pytest.raises(PlanError, match=words):
            normconvert.convert(model, tmp_path / "refused", rewrite, target="llama", **options)

    model = models("olmo")
    refused(model, "stock format alone", "flashnorm")
    refused(model, "stock format alone", format="native")
    refused(become(model, tmp_path / "once", "llama"), "is converted already")
    normconvert.convert(models("llama"), tmp_path / "folded", verify=False)
    refused(tmp_path / "folded", "it is no LayerNorm")
    own_code = Path(shutil.copytree(model, tmp_path / "own"))
    config = json.loads((own_code / "config.json").read_text())
    (own_code / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "a.B"}}))
    refused(own_code, "its own model code")


def test_an_epsilon_that_differs_is_noticed(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twin, "_epsilon", lambda graph: 1e-6)
    with pytest.raises(PlanError, match=r"with epsilon 1e-05, .* with epsilon 1e-06"):
        become(models("olmo"), tmp_path / "output", "llama")


def test_a_table_that_differs_is_noticed(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = twin._config

    def other(*arguments: Any) -> dict[str, Any]:
        return {**exact(*arguments), "rope_parameters": {"rope_type": "default", "rope_theta": 9e3}}

    monkeypatch.setattr(twin, "_config", other)
    with pytest.raises(PlanError, match=r"a table of \[3\] numbers in model.rotary_emb"):
        become(models("olmo"), tmp_path / "output", "llama")


class PhiTwinConfig(PhiConfig):  # type: ignore[misc]
    model_type = "phi_twin"


class PhiTwinNorm(nn.Module):
    """An RMSNorm with the gain 1 + w."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (1 + self.weight)


class PhiTwinForCausalLM(PhiForCausalLM):  # type: ignore[misc]
    config_class = PhiTwinConfig

    def __init__(self, config: PhiTwinConfig) -> None:
        super().__init__(config)
        for owner in (self.model, *self.model.layers):
            for name, module in owner.named_children():
                if isinstance(module, nn.LayerNorm):
                    eps = config.layer_norm_eps
                    setattr(owner, name, PhiTwinNorm(config.hidden_size, eps))


@pytest.fixture
def phi_twin() -> Iterator[str]:
    """A model_type that is Phi with RMSNorms of another convention for the gain."""
    AutoConfig.register("phi_twin", PhiTwinConfig)
    AutoModelForCausalLM.register(PhiTwinConfig, PhiTwinForCausalLM)
    yield "phi_twin"
    del transformers.CONFIG_MAPPING._extra_content["phi_twin"]
    del transformers.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content[PhiTwinConfig]


def test_gains_get_the_twins_identity_and_biases_of_zero_go(
    models: Callable[[str], Path], tmp_path: Path, phi_twin: str
) -> None:
    output = become(models("phi"), tmp_path / "twin", phi_twin)
    stored = load_file(output / "model.safetensors")
    norms = {name: tensor for name, tensor in stored.items() if "layernorm" in name}
    assert {name.rpartition(".")[2] for name in norms} == {"weight"}
    assert not any(tensor.any() for tensor in norms.values())
    assert_same(models("phi"), output)


@pytest.fixture(scope="module")
def side(models: Callable[[str], Path]) -> Side:
    """What an OLMo computes."""
    checkpoint = open_checkpoint(str(models("olmo")))
    graph = trace(checkpoint, further=False)
    config = AutoConfig.from_pretrained(checkpoint.folder)
    found = constants(skeleton(transformers.OlmoForCausalLM, config), graph)
    return Side(graph=graph, constants=found)


def test_the_constants_are_the_inputs_and_the_tables(side: Side) -> None:
    kinds = [key[:2] for key in side.constants.values()]
    assert kinds == [("input", "input_ids"), ("input", "position_ids"), ("constant", (3,))]


def test_a_model_is_itself_and_no_other_whatever_is_changed(side: Side) -> None:
    graph = side.graph
    live = needed(graph.nodes, [value for _, value in graph.outputs])
    assert difference(side, side) is None
    for i, node in enumerate(graph.nodes):
        for changed in () if live.isdisjoint(node.outputs) else changes(node):
            nodes = (*graph.nodes[:i], changed, *graph.nodes[i + 1 :])
            other = replace(side, graph=replace(graph, nodes=nodes))
            assert difference(side, other) is not None, changed


def changes(node: Node) -> Iterator[Node]:
    """`node` with another operation, other numbers, other operands in turn."""
    yield replace(node, op="other")
    for name, argument in node.arguments:
        if isinstance(argument, float):
            arguments = {**dict(node.arguments), name: argument * 1.001 + 1e-9}
            yield replace(node, arguments=tuple(arguments.items()))
    if len(node.arguments) == 2 and len(set(node.inputs)) == 2 and node.op not in ("add", "mul"):
        yield swapped(node)


def swapped(node: Node) -> Node:
    (first, a), (second, b) = node.arguments
    return replace(node, arguments=((first, b), (second, a)))


def test_the_order_of_a_sum_does_not_matter(side: Side) -> None:
    nodes = tuple(
        swapped(node) if node.op in ("add", "mul") and len(node.inputs) == 2 else node
        for node in side.graph.nodes
    )
    assert sum(new is not old for new, old in zip(nodes, side.graph.nodes, strict=True)) > 20
    assert difference(side, replace(side, graph=replace(side.graph, nodes=nodes))) is None


def test_other_inputs_and_unknown_constants_are_noticed(side: Side) -> None:
    ids, positions, table = side.constants
    known = dict(side.constants)
    exchanged = {**known, ids: known[positions], positions: known[ids]}
    assert difference(side, replace(side, constants=exchanged)) is not None
    del known[table]
    unknown = replace(side, constants=known)
    assert difference(unknown, unknown) is not None


def test_what_is_decided_by_the_data_is_not_compared(side: Side) -> None:
    node = Node(op="_local_scalar_dense", arguments=(), outputs=(), module="model.gate")
    other = replace(side, graph=replace(side.graph, nodes=(*side.graph.nodes, node)))
    assert difference(other, other) == "model.gate decides by its data what it computes"


def test_a_target_is_of_the_stock_format(models: Callable[[str], Path], tmp_path: Path) -> None:
    options = ("--target", "llama", "--format", "native")
    run = run_here("rmsnorm", models("olmo"), "-o", "output", *options, cwd=tmp_path)
    assert run.status == 2
    assert "in the stock format alone" in run.err
    assert not list(tmp_path.iterdir())


def test_what_the_command_says(models: Callable[[str], Path], tmp_path: Path) -> None:
    """An OLMo's norms have no gain that they could keep, and stay LayerNorms unless retargeted."""
    said = run_here("rmsnorm", models("olmo"), "--format", "stock", "-o", "output", cwd=tmp_path)
    first, *rest = said.out.splitlines()
    assert first.startswith("Centered what 7 of 7 LayerNorms read, folded 0 of 7 norms: ")
    assert "keeps its gain" not in said.out
    assert rest[-1] == "Wrote output"
