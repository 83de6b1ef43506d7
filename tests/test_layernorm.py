"""LayerNorm models become RMSNorm and CRMSNorm models that compute the same.

`test_native.py` tests how the results live in transformers; here it is what they compute.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import normconvert
import zoo
from normconvert.ir.event import ignore
from normconvert.ir.expression import Center, DropLast, Expression, MinusLast, Scale, Tensor
from normconvert.ir.graph import Graph
from normconvert.ir.plan import Edit, Plan
from normconvert.model_class import resolve
from normconvert.nn import CRMSNorm, RMSNorm
from normconvert.precision import float64
from normconvert.rewrite import write
from normconvert.rewrite.evaluate import Evaluator
from normconvert.settle import Request, settle
from normconvert.source import open_checkpoint
from normconvert.trace import trace
from zoo_layernorm import LAYERNORM

Tied: TypeAlias = Literal["keep", "untie"]
Rewrite: TypeAlias = Literal["rmsnorm", "crmsnorm"]

EXACT = 1e-12  # of the largest output, in float64
WITHOUT_CENTERING = 1e-2

# LayerNorms that are not on a stream, or on one whose mean is seen, by a part of their reason.
KEPT: Mapping[str, Mapping[str, str]] = {
    # What it reads is no residual stream: recentering it would be a LayerNorm in two steps.
    "bloom": {"transformer.word_embeddings_layernorm": "tied to lm_head"},
    "cohere_qk_norm": {"*.q_norm": "", "*.k_norm": ""},
    "stablelm_parallel": {"*.q_layernorm.norms.*": "", "*.k_layernorm.norms.*": ""},
    "persimmon": {"*.q_layernorm": "", "*.k_layernorm": ""},
    "fuyu": {"*.q_layernorm": "", "*.k_layernorm": ""},
    # What this one reads is also added to the output that is pooled.
    "siglip_vision_model": {"head.layernorm": "an output of the model"},
    # The stream itself is an output, with its mean; only what comes before `pre_layrnorm` is not.
    "clip_vision_model": {
        "encoder.layers.*.layer_norm1": "an output of the model",
        "encoder.layers.*.layer_norm2": "an output of the model",
        "post_layernorm": "an output of the model",
    },
}
UNTIED_KEPT: Mapping[str, Mapping[str, str]] = {"bloom": {}}
RECENTERED: Mapping[str, tuple[str, ...]] = {
    "bloom_untied": ("transformer.word_embeddings_layernorm output",),
    "whisper": ("model.encoder.layers.0 input 0", "model.decoder.embed_tokens output"),
    "pegasus": ("model.decoder.embed_tokens output", "model.encoder.embed_tokens output"),
    "xglm": ("model.layers.0 input 0",),
    "gpt2": ("transformer.wte output",),
}
REFUSED = ("bert", "bloom_post_norm_residual", "opt_post_norm", "opt_projected_post_norm")
CONVERTED = sorted(set(LAYERNORM) - set(REFUSED))
UNTIED = ("gpt2", "bloom", "xglm", "whisper", "pegasus", "cohere", "falcon")


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("source") / request.param
    zoo.save(request.param, folder)
    return folder


def load(folder: Path) -> Any:
    """As `zoo.load`, for a native checkpoint."""
    model_class, config = resolve(open_checkpoint(str(folder)), trust_remote_code=False)
    model: Any
    with float64():
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            dtype=torch.float64,
            attn_implementation="eager",
            output_loading_info=True,
        )
    assert not any(info.values()), info
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model.eval()


def outputs(model: Any) -> torch.Tensor:
    with float64():
        return zoo.run(model, zoo.inputs(model, 3, 11))


def starred(norm: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", norm)


def kept_reason(name: str, norm: str, tied: Tied) -> str | None:
    table = UNTIED_KEPT.get(name, KEPT.get(name, {})) if tied == "untie" else KEPT.get(name, {})
    for pattern, reason in table.items():
        if re.fullmatch(re.escape(pattern).replace(r"\*", ".+"), starred(norm)):
            return reason
    return None


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("source", CONVERTED, indirect=True)
def test_exact(source: Path, tmp_path: Path) -> None:
    original = zoo.load(source)
    before = outputs(original)
    assert before.dtype == torch.float64
    graph = trace(open_checkpoint(str(source)))
    plan = check_exact(source, graph, "rmsnorm", "keep", before, tmp_path / "rms")
    check_exact(source, graph, "crmsnorm", "keep", before, tmp_path / "crms")
    if source.name in RECENTERED:
        assert plan.native is not None
        found = {f"{each.module} {each.at}" for each in plan.native.recenterings}
        assert found == set(RECENTERED[source.name])
    put_rmsnorms(original, plan)
    assert relative(outputs(original), before) > WITHOUT_CENTERING


@pytest.mark.parametrize("source", UNTIED, indirect=True)
def test_exact_untied(source: Path, tmp_path: Path) -> None:
    before, graph = outputs(zoo.load(source)), trace(open_checkpoint(str(source)))
    check_exact(source, graph, "rmsnorm", "untie", before, tmp_path / "rms")
    check_exact(source, graph, "crmsnorm", "untie", before, tmp_path / "crms")


@pytest.mark.parametrize(
    ("source", "recentered"),
    [("clip_vision_model", ["pre_layrnorm output"]), ("siglip_vision_model", [])],
    indirect=["source"],
)
@pytest.mark.parametrize("rewrite", ["rmsnorm", "crmsnorm"])
def test_every_layer_norm_where_only_one_output_matters(
    source: Path, recentered: list[str], rewrite: Rewrite, tmp_path: Path
) -> None:
    """The un-normed stream is an output as well, and stands in the way of its LayerNorms."""
    convert, returns = normconvert.convert, ("pooler_output",)
    conversion = convert(source, tmp_path / "output", rewrite, returns=returns)
    assert conversion.status == "converted"
    plan = conversion.inspection.plan
    stays = ["head.layernorm"] if recentered == [] else []
    assert [verdict.norm for verdict in plan.kept(rewrite)] == stays
    assert plan.native is not None
    assert [f"{each.module} {each.at}" for each in plan.native.recenterings] == recentered
    models = zoo.load(source), load(tmp_path / "output")
    inputs = zoo.inputs(models[0], 3, 11)
    with float64(), torch.no_grad():
        before, after = (model(**inputs).pooler_output for model in models)
    assert relative(after, before) <= EXACT
    verify = normconvert.verify_equivalence
    assert verify(source, tmp_path / "output", returns=returns).equivalent


def test_an_output_that_does_not_exist(tmp_path: Path) -> None:
    zoo.save("clip_vision_model", tmp_path / "clip")
    for call in (normconvert.inspect, normconvert.convert):
        with pytest.raises(normconvert.PlanError, match="last_hidden_state, pooler_output"):
            call(tmp_path / "clip", returns=("logits",))


def check_exact(
    source: Path, graph: Graph, rewrite: Rewrite, tied: Tied, before: torch.Tensor, output: Path
) -> Plan:
    """As `normconvert.convert` does it, but from one trace for all: that takes most of the time."""
    checkpoint = open_checkpoint(str(source))
    request = Request(rewrites=(rewrite,), format="native", tied=tied, dtype="keep", fraction=1.0)
    plan, _ = settle(graph, checkpoint, request)
    output.mkdir()
    write(plan, checkpoint, output, {}, ignore)
    converted = load(output)
    check_norms(source.name, rewrite, tied, plan, converted)
    assert relative(outputs(converted), before) <= EXACT
    return plan


def check_norms(name: str, rewrite: Rewrite, tied: Tied, plan: Plan, converted: Any) -> None:
    """Every LayerNorm is replaced, in the plan and in the loaded model, or kept for the reason."""
    kind: type[torch.nn.Module] = RMSNorm if rewrite == "rmsnorm" else CRMSNorm
    verdicts = [v for v in plan.verdicts if v.rule == rewrite and v.kind == "layernorm"]
    assert verdicts
    for verdict in verdicts:
        reason = kept_reason(name, verdict.norm, tied)
        module = converted.get_submodule(verdict.norm)
        assert isinstance(module, kind) == (reason is None), (verdict.norm, verdict.reason)
        assert (verdict.action == "keep") == (reason is not None)
        assert reason is None or reason in verdict.reason
    patterns = {starred(verdict.norm) for verdict in verdicts if verdict.action == "keep"}
    assert len(patterns) == len(KEPT.get(name, {}) if tied == "keep" else patterns)


def put_rmsnorms(model: Any, plan: Plan) -> None:
    """RMSNorms in place of the LayerNorms that the plan replaces, and nothing else changed."""
    for verdict in plan.changed("rmsnorm"):
        norm = model.get_submodule(verdict.norm)
        gain, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        new = RMSNorm(
            plan_size(plan, verdict.norm),
            verdict.eps,
            gain=gain is not None,
            bias=bias is not None,
            offset=verdict.offset if gain is not None else 0.0,
            dtype=torch.float64,
        )
        if gain is not None:
            new.weight = gain
        if bias is not None:
            new.bias = bias
        model.set_submodule(verdict.norm, new)


def plan_size(plan: Plan, norm: str) -> int:
    assert plan.native is not None
    return next(each.size for each in plan.native.norms if each.module == norm)


@pytest.mark.parametrize("source", REFUSED, indirect=True)
def test_post_norm_models_are_refused(source: Path, tmp_path: Path) -> None:
    why = r"because the norm \S+ writes to its stream, which no weight can center \(3 of \d norms\)"
    for rewrite in ("rmsnorm", "crmsnorm"):
        with pytest.raises(normconvert.PlanError, match=why):
            normconvert.convert(source, tmp_path / "output", rewrite)
    assert not list(tmp_path.iterdir())


def test_an_rmsnorm_model_has_nothing_to_center(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path / "llama")
    for rewrite in ("rmsnorm", "crmsnorm"):
        with pytest.raises(normconvert.PlanError, match="it is no LayerNorm"):
            normconvert.convert(tmp_path / "llama", tmp_path / "output", rewrite)


@pytest.mark.parametrize("source", ["gpt2", "stablelm", "vit_classifier"], indirect=True)
def test_stock_weights_are_centered_and_folded(source: Path, tmp_path: Path) -> None:
    """In the unchanged class, with its LayerNorms, and with RMSNorms in their place."""
    output = tmp_path / "output"
    convert = normconvert.convert
    if source.name == "gpt2":
        with pytest.raises(normconvert.PlanError, match="give --tied untie"):
            convert(source, output, "rmsnorm", format="stock")
    conversion = convert(source, output, "rmsnorm", format="stock", tied="untie", verify=False)
    before, model = outputs(zoo.load(source)), zoo.load(output)
    assert relative(outputs(model), before) <= EXACT
    for verdict in conversion.inspection.plan.changed("rmsnorm"):
        norm: Any = model.get_submodule(verdict.norm)
        new = RMSNorm(len(norm.weight), verdict.eps, bias=norm.bias is not None)
        new.weight, new.bias = norm.weight, norm.bias
        model.set_submodule(verdict.norm, new)
    assert relative(outputs(model), before) <= EXACT
    again = convert(output, tmp_path / "again", "rmsnorm", format="stock", tied="untie")
    assert again.status == "unchanged"


@pytest.mark.parametrize("source", ["gpt2", "phimoe"], indirect=True)
def test_steps_give_the_same_bytes_in_any_order(source: Path, tmp_path: Path) -> None:
    ways: dict[str, Any] = {
        "one": "crmsnorm",
        "forth": ("rmsnorm", "flashnorm", "crmsnorm"),
        "back": ("crmsnorm", "flashnorm", "rmsnorm"),
    }
    found = set()
    for name, rewrite in ways.items():
        normconvert.convert(source, tmp_path / name, rewrite, verify=False)
        found.add((tmp_path / name / "model.safetensors").read_bytes())
        found.add((tmp_path / name / "config.json").read_bytes())
    assert len(found) == 2


def test_a_converted_model_is_not_converted_again(tmp_path: Path) -> None:
    zoo.save("gpt_neox", tmp_path / "source")
    normconvert.convert(tmp_path / "source", tmp_path / "rms", "rmsnorm", verify=False)
    again = normconvert.convert(tmp_path / "rms", tmp_path / "again", "rmsnorm")
    assert again.status == "unchanged"
    with pytest.raises(normconvert.PlanError, match="convert its original"):
        normconvert.convert(tmp_path / "rms", tmp_path / "again", "crmsnorm")
    with pytest.raises(normconvert.PlanError, match="native format"):
        normconvert.convert(tmp_path / "rms", tmp_path / "again", "flashnorm")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_rounded_once_and_verified(name: str, dtype: str, tmp_path: Path) -> None:
    zoo.save(name, tmp_path / "source", dtype=dtype)
    conversion = normconvert.convert(tmp_path / "source", tmp_path / "output", "rmsnorm")
    assert conversion.status == "converted"
    before = load_file(tmp_path / "source" / "model.safetensors")
    after = load_file(tmp_path / "output" / "model.safetensors")
    centered = 0
    for edit in conversion.inspection.plan.edits:
        match edit.expression:
            case Center(Tensor(stored), axis):
                exact = before[stored].to(torch.float64)
                exact = exact - exact.mean(axis, keepdim=True)
                check_nearest(after[edit.tensor], exact)
                centered += 1
    assert centered > 6


def check_nearest(found: torch.Tensor, exact: torch.Tensor) -> None:
    """No other number of the dtype is nearer (but for the last bits of float64)."""
    distance = (found.to(torch.float64) - exact).abs()
    for step in (1, -1):
        integers = {2: torch.int16, 4: torch.int32}[found.itemsize]
        neighbour = (found.view(integers) + step).view(found.dtype).to(torch.float64)
        other = (neighbour - exact).abs()
        assert (distance <= other + 1e-15 * exact.abs().max()).all()


# --- prmsnorm


def test_partial_rmsnorm_is_an_approximation(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path / "source", dtype="float32")
    half = normconvert.convert(tmp_path / "source", tmp_path / "half", "prmsnorm", fraction=0.5)
    assert half.status == "converted"
    assert half.verification is not None
    assert not half.verification.equivalent
    assert not normconvert.verify_equivalence(tmp_path / "source", tmp_path / "half").equivalent
    whole = normconvert.convert(tmp_path / "source", tmp_path / "all", "prmsnorm", fraction=1.0)
    assert whole.verification is not None
    assert max(c.max for c in whole.verification.comparisons) < 1e-10


def test_partial_rmsnorm_of_a_layernorm_model(tmp_path: Path) -> None:
    zoo.save("gpt_neox", tmp_path / "source", dtype="float32")
    normconvert.convert(tmp_path / "source", tmp_path / "rms", "rmsnorm", verify=False)
    conversion = normconvert.convert(tmp_path / "rms", tmp_path / "output", "prmsnorm")
    assert len(conversion.inspection.plan.changed("prmsnorm")) == 7
    assert conversion.verification is not None
    assert not conversion.verification.equivalent


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5, float("nan")])
def test_a_fraction_is_between_0_and_1(fraction: float, tmp_path: Path) -> None:
    zoo.save("llama", tmp_path / "source")
    with pytest.raises(normconvert.PlanError, match="is not between 0 and 1"):
        normconvert.convert(tmp_path / "source", tmp_path / "out", "prmsnorm", fraction=fraction)


# --- the expressions


def apply(expression: Expression, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What an expression is, in torch's own words."""
    match expression:
        case Tensor(name):
            return tensors[name].to(torch.float64)
        case Scale(of, axis, by):
            matrix, vector = apply(of, tensors), apply(by, tensors)
            return matrix * vector.reshape([-1 if i == axis else 1 for i in range(matrix.ndim)])
        case Center(of, axis):
            matrix = apply(of, tensors)
            return matrix - matrix.mean(axis, keepdim=True)
        case DropLast(of, axis):
            matrix = apply(of, tensors)
            return matrix.narrow(axis, 0, matrix.shape[axis] - 1)
        case MinusLast(of, axis):
            matrix = apply(of, tensors)
            size = matrix.shape[axis]
            return matrix.narrow(axis, 0, size - 1) - matrix.narrow(axis, size - 1, 1)
    raise AssertionError(expression)


WRAPPERS: tuple[Callable[[Expression, int], Expression], ...] = (Center, DropLast, MinusLast)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_expressions_are_what_they_say(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shape = data.draw(st.lists(st.integers(3, 9), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    tensors = {"w": torch.randn(shape, generator=generator, dtype=torch.float64)}
    expression: Expression = Tensor("w")
    for _ in range(data.draw(st.integers(1, 3))):
        wrap = data.draw(st.sampled_from(WRAPPERS))
        if min(apply(expression, tensors).shape) > 1:
            expression = wrap(expression, data.draw(st.integers(0, len(shape) - 1)))
    if data.draw(st.booleans()):
        axis = data.draw(st.integers(0, len(shape) - 1))
        size = apply(expression, tensors).shape[axis]
        tensors["g"] = torch.randn(size, generator=generator, dtype=torch.float64)
        expression = Scale(expression, axis, Tensor("g"))
    folder = tmp_path_factory.mktemp("expression")
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    expected = apply(expression, tensors)
    edit = Edit(tensor="w", dtype="F64", shape=tuple(expected.shape), expression=expression)
    rows = expected.numel() // expected.shape[-1] if expected.ndim > 1 else 1
    cut = data.draw(st.integers(0, rows))
    with Evaluator(open_checkpoint(str(folder))) as evaluator:
        spans = [(0, rows)] if expected.ndim < 2 else [(0, cut), (cut, rows)]
        parts = [evaluator.rows(edit, first, last) for first, last in spans if last > first]
    found = torch.cat([part.reshape(-1) for part in parts])
    assert torch.allclose(found, expected.reshape(-1), rtol=1e-13, atol=1e-13)


def test_sabotage_of_centering_is_noticed(tmp_path: Path) -> None:
    """One writer left as it was: RMSNorm sees its mean, and verifying says so."""
    source, output = tmp_path / "source", tmp_path / "output"
    zoo.save("gpt2", source, dtype="float32")
    checkpoint = open_checkpoint(str(source))
    plan = normconvert.convert(source, output, "rmsnorm", dry_run=True).inspection.plan
    victim = next(e for e in plan.edits if e.tensor.endswith("h.1.mlp.c_proj.weight"))
    assert isinstance(victim.expression, Center)
    edits = tuple(edit for edit in plan.edits if edit is not victim)
    output.mkdir()
    write(replace(plan, edits=edits), checkpoint, output, {}, ignore)
    (output / "normconvert.json").unlink()  # so that only the logits can tell
    assert not normconvert.verify_equivalence(source, output).equivalent
