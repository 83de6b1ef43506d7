"""What does not run on a plain input: it may write to a residual stream, and it may read a norm.

A converted model must compute the same with it, or it must not be made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

import normconvert
import zoo
from normconvert.precision import float64
from normconvert.source import open_checkpoint
from normconvert.trace import trace
from normconvert.verify.loading import load_model

EXACT = 1e-12
PLACEHOLDER = 7  # the token in whose place a piece of an image is put


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _tokens(first: list[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(PLACEHOLDER + 1, 101, (2, 11), generator=generator)
    ids[:, : len(first)] = torch.tensor(first)
    return ids


def _gpt2() -> transformers.PreTrainedModel:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=101, n_embd=54, n_layer=3, n_head=9, n_positions=64, add_cross_attention=True
        )
    )


def _whisper() -> transformers.PreTrainedModel:
    return transformers.WhisperForCausalLM(
        transformers.WhisperConfig(
            vocab_size=101, d_model=54, decoder_layers=3, decoder_attention_heads=9,
            decoder_ffn_dim=88, max_target_positions=64, pad_token_id=0,
        )
    )  # fmt: skip


def _fuyu() -> transformers.PreTrainedModel:
    return transformers.FuyuForCausalLM(
        transformers.FuyuConfig(
            **_SMALL, vocab_size=101, patch_size=2, num_channels=3, image_token_id=PLACEHOLDER,
            text_config={"model_type": "persimmon", "vocab_size": 101, **_SMALL},
        )
    )  # fmt: skip


def _llava() -> transformers.PreTrainedModel:
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**_SMALL, image_size=15, patch_size=5),
            text_config=transformers.PhiConfig(**_SMALL, vocab_size=101, pad_token_id=0),
            image_token_id=PLACEHOLDER, vision_feature_layer=-1,
        )
    )  # fmt: skip


def _dinov2() -> transformers.PreTrainedModel:
    return transformers.Dinov2Model(
        transformers.Dinov2Config(**_SMALL, image_size=15, patch_size=5, use_mask_token=True)
    )


def _vit() -> transformers.PreTrainedModel:
    return transformers.ViTForMaskedImageModeling(
        transformers.ViTConfig(**_SMALL, image_size=15, patch_size=5, encoder_stride=5)
    )


_SMALL: Mapping[str, Any] = {
    "hidden_size": 72,  # whose heads can be rotated in part
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
}
_MASK = torch.arange(9).remainder(2).bool().expand(2, 9)
_IMAGE = {"pixel_values": _random(2, 3, 15, 15)}
CASES: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "states of an encoder": (
        _gpt2, {"input_ids": _tokens([]), "encoder_hidden_states": _random(2, 5, 54)}
    ),
    "outputs of an encoder": (
        _whisper, {"input_ids": _tokens([]), "encoder_outputs": (_random(2, 5, 54),)}
    ),
    "patches of an image": (
        _fuyu, {"input_ids": _tokens([PLACEHOLDER] * 4), "image_patches": _random(2, 4, 12)}
    ),
    "an image": (_llava, {"input_ids": _tokens([PLACEHOLDER] * 9), **_IMAGE}),
    "a mask token": (_dinov2, {"bool_masked_pos": _MASK, **_IMAGE}),
    "a mask token, reconstructed": (_vit, {"bool_masked_pos": _MASK, **_IMAGE}),
}  # fmt: skip


def save(make: Any, folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        model = make()
    zoo._randomise(model, torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    return folder


def outputs(folder: Path, inputs: Mapping[str, Any]) -> torch.Tensor:
    model = load_model(open_checkpoint(str(folder)), torch.float64, trust_remote_code=False)
    with torch.no_grad(), float64():
        output = model(**inputs)
    found: torch.Tensor = next(
        output[key] for key in ("logits", "reconstruction", "pooler_output") if key in output
    )
    return found


@pytest.mark.parametrize("rewrite", ["flashnorm", "rmsnorm", "crmsnorm"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_on_another_input(case: str, rewrite: Any, tmp_path: Path) -> None:
    make, inputs = CASES[case]
    source = save(make, tmp_path / "source")
    normconvert.convert(source, tmp_path / "output", rewrite)
    before = outputs(source, inputs)
    without = {key: value for key, value in inputs.items() if key in ("input_ids", "pixel_values")}
    if case != "an image":  # without one, its places cannot be filled
        assert (outputs(source, without) - before).abs().max() > 0.01 * before.abs().max()
    after = outputs(tmp_path / "output", inputs)
    assert (after - before).abs().max() <= EXACT * before.abs().max()


def _qwen_vl() -> transformers.PreTrainedModel:
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(
            text_config={
                **_SMALL, "vocab_size": 101, "num_key_value_heads": 3,
                "rope_parameters": {
                    "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]
                },
            },
            vision_config={
                "depth": 3, "num_heads": 9, "embed_dim": 72, "hidden_size": 72, "mlp_ratio": 2,
                "patch_size": 3,
            },
            image_token_id=PLACEHOLDER,
        )
    )  # fmt: skip


def test_patches_of_images_of_any_size(tmp_path: Path) -> None:
    source = save(_qwen_vl, tmp_path / "source")
    conversion = normconvert.convert(source, tmp_path / "output")
    assert "model.visual.merger.ln_q" in {v.norm for v in conversion.inspection.plan.folded}
    assert conversion.inspection.plan.kept("flashnorm") == ()
    verification = conversion.verification
    assert verification is not None
    assert "model.visual, images" in [each.tokens for each in verification.comparisons]
    grid = torch.tensor([[1, 4, 6], [1, 6, 4]])  # four patches are merged: 6 tokens for each image
    inputs = {
        "input_ids": _tokens([PLACEHOLDER] * 6),
        "pixel_values": _random(48, 3 * 2 * 3 * 3),
        "image_grid_thw": grid,
        "mm_token_type_ids": torch.arange(11).lt(6).int().expand(2, 11),
    }
    before, after = outputs(source, inputs), outputs(tmp_path / "output", inputs)
    other = outputs(source, {**inputs, "pixel_values": inputs["pixel_values"].flip(0)})
    assert (other - before).abs().max() > 0.01 * before.abs().max()
    assert (after - before).abs().max() <= EXACT * before.abs().max()


def test_what_cannot_be_shut_out_is_refused(tmp_path: Path) -> None:
    source = save(_fuyu, tmp_path / "source")
    with pytest.raises(
        normconvert.PlanError,
        match=r"vision_embed_tokens\.weight, which was not read in the trace, may write",
    ):
        normconvert.convert(source, tmp_path / "output", "rmsnorm", format="stock", tied="untie")
    assert not (tmp_path / "output").exists()


def test_a_way_around_the_recentering_is_closed(tmp_path: Path) -> None:
    source = save(_fuyu, tmp_path / "source")
    normconvert.convert(source, tmp_path / "output", "rmsnorm", verify=False)
    checkpoint = open_checkpoint(str(tmp_path / "output"))
    model = load_model(checkpoint, torch.float64, trust_remote_code=False)
    with pytest.raises(ValueError, match="takes no other input than inputs_embeds"):
        model.model.language_model(input_ids=_tokens([]))


# --- what may read a norm, and did not run


def _ernie() -> transformers.PreTrainedModel:
    return transformers.Ernie4_5_VLMoeForConditionalGeneration(
        transformers.Ernie4_5_VLMoeConfig(
            text_config={
                "vocab_size": 101, "hidden_size": 48, "intermediate_size": 64,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                "moe_intermediate_size": [24, 20], "moe_k": 2, "moe_num_experts": 4,
                "moe_num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"],
                "max_position_embeddings": 64, "pad_token_id": 0,
                "rope_parameters": {
                    "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]
                },
            },
            vision_config={
                "depth": 1, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2,
                "patch_size": 4,
            },
            tie_word_embeddings=False,
        )
    )  # fmt: skip


def _janus() -> transformers.PreTrainedModel:
    return transformers.JanusForConditionalGeneration(
        transformers.JanusConfig(
            text_config={
                "vocab_size": 101, "hidden_size": 48, "intermediate_size": 64,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            },
            vision_config={
                "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "depth": 2,
                "image_size": 16, "patch_size": 8, "projection_dim": 48, "mlp_ratio": 2.0,
            },
            vq_config={
                "embed_dim": 8, "num_embeddings": 20, "num_patches": 2, "projection_dim": 48,
                "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1,
                "image_token_embed_dim": 48, "in_channels": 3, "double_latent": False,
                "z_channels": 32, "latent_channels": 32,
            },
            image_token_id=5, tie_word_embeddings=False,
        )
    )  # fmt: skip


def verdicts(folder: Path) -> dict[str, str]:
    """Module of a norm -> the verdict on it, and the reason if it stays."""
    plan = normconvert.inspect(folder).plan
    return {v.norm: v.reason if v.action == "keep" else v.action for v in plan.verdicts}


def test_experts_for_another_modality(tmp_path: Path) -> None:
    source = save(_ernie, tmp_path / "source")
    normconvert.convert(source, tmp_path / "output", verify=False)
    layer = "model.language_model.layers.1"
    found = verdicts(source)
    assert found[f"{layer}.post_attention_layernorm"].startswith(f"{layer}.mlp.vision_moe.")
    text = [found[name] for name in found if name.startswith("model.language_model.")]
    assert text.count("fold") == len(text) - 1 == 4
    ids = _tokens([])
    kinds = torch.zeros_like(ids)
    kinds[:, 3:6] = 1
    inputs = {"input_ids": ids, "moe_mm_token_type_ids": kinds}
    before, after = outputs(source, inputs), outputs(tmp_path / "output", inputs)
    assert (before - outputs(source, {"input_ids": ids})).abs().max() > 0.01 * before.abs().max()
    assert (after - before).abs().max() <= EXACT * before.abs().max()


def test_a_head_for_images(tmp_path: Path) -> None:
    """The outer model gets the norm's output back from the inner one."""
    source = save(_janus, tmp_path / "source")
    found = verdicts(source)
    reason = found.pop("model.language_model.norm")
    assert reason.endswith(", which was not read in the trace, may read it")
    # Its second tower, for images to write, cannot be run: it does not keep the first from being.
    assert found.pop("model.vision_model.post_layernorm").startswith("it is an output of a part")
    assert found.pop("model.vision_model.encoder.layers.0.layer_norm1") == "fold"
    assert set(found.values()) == {"fold"}
    normconvert.convert(source, tmp_path / "output", verify=False)
    images = []
    for folder in (source, tmp_path / "output"):
        model = load_model(open_checkpoint(str(folder)), torch.float64, trust_remote_code=False)
        with torch.no_grad(), float64():
            states = model.model(input_ids=_tokens([])).last_hidden_state
            images.append(model.model.generation_head(states))
    assert (images[1] - images[0]).abs().max() <= EXACT * images[0].abs().max()


def test_the_way_of_an_image_is_known(tmp_path: Path) -> None:
    """A projector as wide as the norm, but its place is in front of the model."""
    found = verdicts(save(_llava, tmp_path / "source"))
    assert found["model.language_model.final_layernorm"] == "fold"
    graph = trace(open_checkpoint(str(tmp_path / "source")))
    assert graph.unread_parameters == ()
    assert any(name.startswith("model.get_image_features.") for name, _ in graph.towers)


class _OnThreeTokens(LlamaMLP):  # type: ignore[misc]
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.side = torch.nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = super().forward(x)
        return output + self.side(torch.cat([x, x], -1)) if x.shape[1] == 3 else output


class OnThreeTokensForCausalLM(transformers.LlamaForCausalLM):  # type: ignore[misc]
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[1].mlp = _OnThreeTokens(config)


def test_a_weight_for_three_tokens(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**_SMALL, vocab_size=101)
    source = save(lambda: OnThreeTokensForCausalLM(config), tmp_path / "source")
    plan = normconvert.inspect(source, model_class=OnThreeTokensForCausalLM).plan
    kept = {v.norm: v.reason for v in plan.verdicts if v.action == "keep"}
    assert kept == {
        "model.layers.1.post_attention_layernorm": "model.layers.1.mlp.side.weight, which was not "
        "read in the trace, may read it"
    }


# --- branches without weights of their own: only a pass through them shows what they read


class _OnLongTexts(LlamaMLP):  # type: ignore[misc]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = super().forward(x)
        return output + x if x.shape[1] > 1000 else output


class OnLongTextsForCausalLM(transformers.LlamaForCausalLM):  # type: ignore[misc]
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[1].mlp = _OnLongTexts(config)


def test_a_norm_that_is_added_in_long_texts(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**_SMALL, vocab_size=101)
    source = save(lambda: OnLongTextsForCausalLM(config), tmp_path / "source")
    plan = normconvert.inspect(source, model_class=OnLongTextsForCausalLM).plan
    kept = {v.norm: v.reason for v in plan.verdicts if v.action == "keep"}
    assert kept == {
        "model.layers.1.post_attention_layernorm": "it is added to another activation in "
        "model.layers.1.mlp on a long text, not multiplied by a weight"
    }


class _BlockOnLongTexts(GPT2Block):  # type: ignore[misc]
    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = super().forward(*args, **kwargs)
        return output + output.square() if output.shape[1] > 1000 else output


class OnLongTextsLMHeadModel(transformers.GPT2LMHeadModel):  # type: ignore[misc]
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.transformer.h[1] = _BlockOnLongTexts(config, layer_idx=1)


@pytest.mark.parametrize("positions", [1024, 512])
def test_a_stream_that_is_squared_in_long_texts(positions: int, tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=101, n_embd=54, n_layer=3, n_head=9, n_positions=positions,
        tie_word_embeddings=False,
    )  # fmt: skip
    source = save(lambda: OnLongTextsLMHeadModel(config), tmp_path / "source")
    convert = partial(
        normconvert.convert, source, tmp_path / "output", "rmsnorm", format="stock",
        model_class=OnLongTextsLMHeadModel, verify=False,
    )  # fmt: skip
    if positions > 1000:
        with pytest.raises(normconvert.PlanError, match=r"transformer\.h\.1"):
            convert()
    else:  # it never gets there
        assert convert().status == "converted"


_IN_USE = "on a batch of one with a mask, a cache, labels, all outputs"
_WITH_A_CACHE = "on one token with a cache"
CONDITIONS: Mapping[str, tuple[Callable[[Mapping[str, Any]], bool], str]] = {
    "a mask": (lambda given: given.get("attention_mask") is not None, _IN_USE),
    "use_cache": (lambda given: bool(given.get("use_cache")), _IN_USE),
    "labels": (lambda given: given.get("labels") is not None, _IN_USE),
    "output_attentions": (lambda given: bool(given.get("output_attentions")), _IN_USE),
    "output_hidden_states": (lambda given: bool(given.get("output_hidden_states")), _IN_USE),
    "one text": (lambda given: given["input_ids"].shape[0] == 1, _IN_USE),
    "gradients": (lambda given: torch.is_grad_enabled(), _IN_USE),
    "one token": (lambda given: given["input_ids"].shape[1] == 1, _WITH_A_CACHE),
    "a cache": (lambda given: given.get("past_key_values") is not None, _WITH_A_CACHE),
}


class _Otherwise(LlamaMLP):  # type: ignore[misc]
    otherwise = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = super().forward(x)
        return output + x if self.otherwise else output


class OtherwiseForCausalLM(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Reads a norm in another way on a condition, and may not take some inputs at all."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[1].mlp = _Otherwise(config)

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: Any = None,
        labels: Any = None,
        **kwargs: Any,
    ) -> Any:
        given = {name: each for name, each in locals().items() if name != "self"} | kwargs
        self.model.layers[1].mlp.otherwise = CONDITIONS[self.config.condition][0](given)
        if any(given.get(name) is not None for name in self.config.refused):
            raise NotImplementedError
        return super().forward(
            input_ids, attention_mask, position_ids, past_key_values, labels=labels,
            use_cache=use_cache, **kwargs,
        )  # fmt: skip


def _kept_otherwise(condition: str, refused: tuple[str, ...], folder: Path) -> dict[str, str]:
    config = transformers.LlamaConfig(
        **_SMALL, vocab_size=101, condition=condition, refused=refused
    )
    source = save(lambda: OtherwiseForCausalLM(config), folder / "source")
    plan = normconvert.inspect(source, model_class=OtherwiseForCausalLM).plan
    return {v.norm: v.reason for v in plan.verdicts if v.action == "keep"}


def _added(where: str) -> dict[str, str]:
    return {
        "model.layers.1.post_attention_layernorm": "it is added to another activation in "
        f"model.layers.1.mlp {where}, not multiplied by a weight"
    }


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_norm_that_is_added_in_use(condition: str, tmp_path: Path) -> None:
    assert _kept_otherwise(condition, (), tmp_path) == _added(CONDITIONS[condition][1])


@pytest.mark.parametrize("refused", ["labels", "output_hidden_states"])
def test_what_a_model_does_not_take_hides_nothing_else(refused: str, tmp_path: Path) -> None:
    asked = {"labels": ", all outputs", "output_hidden_states": ""}[refused]
    for condition, where in (
        ("a mask", f"on a batch of one with a mask, a cache{asked}"),
        ("a cache", _WITH_A_CACHE),
    ):
        found = _kept_otherwise(condition, (refused,), tmp_path / condition)
        assert found == _added(where)


def test_a_model_that_takes_no_cache_loses_nothing(tmp_path: Path) -> None:
    assert _kept_otherwise("a cache", ("past_key_values", "labels"), tmp_path) == {}


class _BlockWithACache(GPT2Block):  # type: ignore[misc]
    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = super().forward(*args, **kwargs)
        return output + output.square() if output.shape[:2] == (1, 1) else output


class WithACacheLMHeadModel(transformers.GPT2LMHeadModel):  # type: ignore[misc]
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.transformer.h[1] = _BlockWithACache(config, layer_idx=1)


def test_a_stream_that_is_squared_with_a_cache(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=101, n_embd=54, n_layer=3, n_head=9, n_positions=64, tie_word_embeddings=False
    )
    source = save(lambda: WithACacheLMHeadModel(config), tmp_path / "source")
    with pytest.raises(normconvert.PlanError, match=rf"in transformer\.h\.1 {_WITH_A_CACHE}"):
        normconvert.convert(
            source, tmp_path / "output", "rmsnorm", format="stock", verify=False,
            model_class=WithACacheLMHeadModel,
        )  # fmt: skip


class ReturnsATupleForCausalLM(OtherwiseForCausalLM):
    @wraps(OtherwiseForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().forward(*args, **kwargs).to_tuple()


def test_a_cache_in_a_tuple(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**_SMALL, vocab_size=101, condition="a cache", refused=())
    source = save(lambda: ReturnsATupleForCausalLM(config), tmp_path / "source")
    plan = normconvert.inspect(source, model_class=ReturnsATupleForCausalLM).plan
    assert {v.norm: v.reason for v in plan.verdicts if v.action == "keep"} == _added(_WITH_A_CACHE)


class _AsDataSays(LlamaAttention):  # type: ignore[misc]
    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        output, weights = super().forward(hidden_states, *args, **kwargs)
        positive = bool(self.o_proj.weight[0, 0] > 0)
        if positive == self.config.added_if:
            output = output + hidden_states
        return output, weights


class AsDataSaysForCausalLM(transformers.LlamaForCausalLM):  # type: ignore[misc]
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[1].self_attn = _AsDataSays(config, layer_idx=1)


@pytest.mark.parametrize("added_if", [True, False])
def test_both_ways_of_a_branch_on_data_are_traced(added_if: bool, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**_SMALL, vocab_size=101, added_if=added_if)
    source = save(lambda: AsDataSaysForCausalLM(config), tmp_path / "source")
    plan = normconvert.inspect(source, model_class=AsDataSaysForCausalLM).plan
    kept = {v.norm: v.reason for v in plan.verdicts if v.action == "keep"}
    where = "model.layers.1.self_attn" + ("" if added_if else " on other data")
    assert kept == {
        "model.layers.1.input_layernorm": f"it is added to another activation in {where}, "
        "not multiplied by a weight"
    }


class _Recast(LlamaMLP):  # type: ignore[misc]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.gate_proj: torch.nn.Module = self.gate_proj.to(x.dtype)
        output: torch.Tensor = super().forward(x)
        return output + x if x.shape[1] == 1 else output


class RecastForCausalLM(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Casts a layer whenever it runs, as routers of transformers do."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[1].mlp = _Recast(config)


def test_a_layer_that_is_cast_while_it_runs(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**_SMALL, vocab_size=101)
    source = save(lambda: RecastForCausalLM(config), tmp_path / "source")
    plan = normconvert.inspect(source, model_class=RecastForCausalLM).plan
    assert [(v.norm, v.reason) for v in plan.verdicts if v.action == "keep"] == [
        (
            "model.layers.1.post_attention_layernorm",
            "it is added to another activation in model.layers.1.mlp on one token with a cache, "
            "not multiplied by a weight",
        )
    ]


def test_a_decoder_goes_on_with_the_states_of_its_encoder(tmp_path: Path) -> None:
    config = transformers.SwitchTransformersConfig(
        vocab_size=101, d_model=54, d_ff=88, d_kv=10, num_layers=2, num_decoder_layers=2,
        num_heads=9, num_experts=3, decoder_start_token_id=0,
    )  # fmt: skip
    make = partial(transformers.SwitchTransformersForConditionalGeneration, config)
    graph = trace(open_checkpoint(str(save(make, tmp_path / "source"))))
    assert [what for _, what in graph.passes][-1] == "on one token with a cache"
