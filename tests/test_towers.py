"""Images in a model of text: the tower, the projector, and what the text model makes of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.phi.modeling_phi import PhiMLP

import normconvert
import zoo
from normconvert.source import open_checkpoint
from normconvert.trace import trace

PLACE = 7  # the token in whose place a piece of an image is put
_SMALL: dict[str, Any] = {
    "hidden_size": 72,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
}


def _with_a_norm() -> transformers.PreTrainedModel:
    """In the projector, whose norm reads four patches at once."""
    return transformers.AyaVisionForConditionalGeneration(
        transformers.AyaVisionConfig(
            vision_config=transformers.SiglipVisionConfig(**_SMALL, image_size=12, patch_size=3),
            text_config=transformers.Cohere2Config(
                **_SMALL, vocab_size=101, num_key_value_heads=3, pad_token_id=0
            ),
            image_token_id=PLACE,
        )
    )


def _into_layer_norms() -> transformers.PreTrainedModel:
    """The projector writes to a stream that LayerNorms read."""
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**_SMALL, image_size=15, patch_size=5),
            text_config=transformers.PhiConfig(**_SMALL, vocab_size=101, pad_token_id=0),
            image_token_id=PLACE,
        )
    )


def _save(make: Any, folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        model = make()
    zoo._randomise(model, torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    return folder


def _apart(verification: normconvert.Equivalence | None) -> set[str]:
    """What was compared and is not the same."""
    assert verification is not None
    return {each.tokens for each in verification.comparisons if not each.equivalent}


def test_the_norm_of_a_projector_is_folded_and_compared(tmp_path: Path) -> None:
    source = _save(_with_a_norm, tmp_path / "source")
    conversion = normconvert.convert(source, tmp_path / "output", "flashnorm")
    verdicts = {verdict.norm: verdict.action for verdict in conversion.inspection.plan.verdicts}
    assert verdicts["model.multi_modal_projector.layernorm"] == "fold"
    assert conversion.verification is not None
    compared = {each.tokens for each in conversion.verification.comparisons}
    assert {"model.get_image_features, images, pooled", "images in a text"} <= compared

    weights = tmp_path / "output" / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("projector.linear_1.weight"))
    tensors[name][3, 5] *= 2
    save_file(tensors, weights, metadata={"format": "pt"})
    wrong = normconvert.verify_equivalence(source, tmp_path / "output")
    assert _apart(wrong) == {"model.get_image_features, images, pooled", "images in a text"}


def test_what_images_write_to_a_text_is_compared(tmp_path: Path) -> None:
    """Were the projector overlooked, the text's LayerNorms would be changed: wrong for images."""
    source = _save(_into_layer_norms, tmp_path / "source")
    with (
        patch("normconvert.rules.stream.unseen_writers", return_value=()),
        patch("normconvert.trace.further.in_a_text", return_value=None),
    ):
        wrong = normconvert.convert(source, tmp_path / "wrong", "rmsnorm")
    assert wrong.status == "rejected"
    assert _apart(wrong.verification) == {"images in a text"}
    right = normconvert.convert(source, tmp_path / "output", "rmsnorm")
    assert right.status == "converted"
    assert _apart(right.verification) == set()


class _AddedBesideImages(PhiMLP):  # type: ignore[misc]
    beside_images = False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = super().forward(hidden_states)
        return output + hidden_states if self.beside_images else output


class ImagesInATextModel(transformers.LlavaForConditionalGeneration):  # type: ignore[misc]
    """Reads a norm in another way where there are images in the text."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.language_model.layers[1].mlp = _AddedBesideImages(config.text_config)

    def forward(self, input_ids: Any = None, pixel_values: Any = None, **options: Any) -> Any:
        self.model.language_model.layers[1].mlp.beside_images = pixel_values is not None
        return super().forward(input_ids, pixel_values, **options)


def test_a_norm_that_is_read_otherwise_beside_images(tmp_path: Path) -> None:
    config = _into_layer_norms().config
    source = _save(lambda: ImagesInATextModel(config), tmp_path / "source")
    plan = normconvert.inspect(source, model_class=ImagesInATextModel).plan
    kept = {v.norm: v.reason for v in plan.verdicts if v.action == "keep"}
    layer = "model.language_model.layers.1"
    assert kept[f"{layer}.input_layernorm"] == (
        f"it is added to another activation in {layer}.mlp on images in a text, not multiplied by "
        "a weight"
    )


def test_what_images_write_to_a_text_is_seen(tmp_path: Path) -> None:
    """The projector is in the stream of the text, and so that is recentered behind it, once."""
    source = _save(_into_layer_norms, tmp_path / "source")
    graph = trace(open_checkpoint(str(source)))
    assert not graph.failed
    assert not graph.apart
    (mixed,) = (node for node in graph.nodes if node.op == "masked_scatter")
    assert graph.where(graph.nodes.index(mixed)) == "model on images in a text"
    projector = graph.parameter_values["model.multi_modal_projector.linear_2.weight"]
    assert projector in graph.behind_outputs
    rewrites: tuple[Any, ...] = ("rmsnorm", "crmsnorm")
    for rewrite in rewrites:
        conversion = normconvert.convert(source, tmp_path / rewrite, rewrite)
        native = conversion.inspection.plan.native
        assert native is not None
        assert [each.module for each in native.recenterings] == ["model.language_model.layers.0"]
        assert conversion.status == "converted"


class WithMore(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """A norm that no forward pass runs."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.spare = LlamaRMSNorm(20)


def test_a_norm_that_nothing_runs_has_a_verdict(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**_SMALL, vocab_size=101)
    source = _save(lambda: WithMore(config), tmp_path / "source")
    plan = normconvert.inspect(source, model_class=WithMore).plan
    kept = {(verdict.norm, verdict.reason) for verdict in plan.verdicts if verdict.action == "keep"}
    assert kept == {("spare", "no pass of the trace runs it")}
    assert len(plan.verdicts) == 6


class FilledLMHeadModel(transformers.GPT2LMHeadModel):  # type: ignore[misc]
    """Other vectors take the place of some embeddings, or only of half of each of them."""

    whole = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.transformer.other = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, input_ids: Any = None, **options: Any) -> Any:
        chosen = input_ids.lt(50).unsqueeze(-1)
        if not self.whole:
            chosen = chosen & torch.arange(self.config.n_embd).lt(self.config.n_embd // 2)
        embeddings = self.transformer.wte(input_ids)
        filling = self.transformer.other(input_ids.flip(1))
        filled = embeddings.masked_scatter(chosen.expand_as(embeddings), filling)
        return super().forward(inputs_embeds=filled, **options)


class HalfFilledLMHeadModel(FilledLMHeadModel):
    whole = False


@pytest.mark.parametrize("model_class", [FilledLMHeadModel, HalfFilledLMHeadModel])
def test_what_fills_whole_vectors_is_centered(model_class: Any, tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=101, n_embd=54, n_layer=2, n_head=9, n_positions=64, tie_word_embeddings=False
    )
    source = _save(lambda: model_class(config), tmp_path / "source")
    output = tmp_path / "output"
    convert = partial(
        normconvert.convert, source, output, "rmsnorm", format="stock", model_class=model_class
    )
    if not model_class.whole:
        with pytest.raises(normconvert.PlanError, match="masked_scatter in Half"):
            convert()
        return
    convert()
    stock = transformers.GPT2Config.from_pretrained(output)
    model = model_class.from_pretrained(output, config=stock)
    for embedding in (model.transformer.wte, model.transformer.other):
        assert embedding.weight.mean(1).abs().max() < 1e-6


def _text_and_images() -> transformers.PreTrainedModel:
    """Compares the two: it takes no text without an image."""
    text: dict[str, Any] = {
        **_SMALL,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    image: dict[str, Any] = {**_SMALL, "image_size": 15, "patch_size": 5}
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**text, "vocab_size": 101}, vision_config=image, projection_dim=20
        )
    )


def test_a_model_that_compares_text_and_images(tmp_path: Path) -> None:
    source = _save(_text_and_images, tmp_path / "source")
    graph = trace(open_checkpoint(str(source)))
    assert [what for _, what in graph.passes] == [
        "on a long text", "on a batch of one with a mask, all outputs", "", "",
    ]  # fmt: skip
    assert not graph.unread_parameters
    rewrites: tuple[Any, ...] = ("flashnorm", "rmsnorm", "crmsnorm")
    for rewrite in rewrites:
        conversion = normconvert.convert(source, tmp_path / rewrite, rewrite)
        assert conversion.status == "converted"
        assert len(conversion.inspection.plan.changed(rewrite)) >= 6

    weights = tmp_path / "flashnorm" / "model.safetensors"
    before = load_file(weights)
    for tower in ("text", "vision"):
        name = f"{tower}_model.encoder.layers.0.mlp.fc1.weight"
        wrong = before[name].clone()
        wrong[3, 5] *= 3
        save_file({**before, name: wrong}, weights, metadata={"format": "pt"})
        found = _apart(normconvert.verify_equivalence(source, tmp_path / "flashnorm"))
        side = "text" if tower == "text" else "image"
        other = "image" if tower == "text" else "text"
        assert {"random", f"random, {side}_embeds"} <= found
        assert f"random, {other}_embeds" not in found


class ForLargeImages(transformers.CLIPModel):  # type: ignore[misc]
    def forward(self, input_ids: Any = None, pixel_values: Any = None, **options: Any) -> Any:
        if pixel_values is not None and pixel_values.shape[-1] < 1000:
            raise ValueError("too small")
        return super().forward(input_ids, pixel_values, **options)


def test_images_that_a_model_cannot_read_are_a_sentence(tmp_path: Path) -> None:
    source = _save(_text_and_images, tmp_path / "source")
    with pytest.raises(normconvert.TraceError) as refused:
        normconvert.inspect(source, model_class=ForLargeImages)
    said = str(refused.value)
    assert said.startswith("ForLargeImages runs neither on text alone (")
    assert said.endswith(") nor with images beside it (ValueError: too small).")


class WithABrokenTowerModel(transformers.LlavaForConditionalGeneration):  # type: ignore[misc]
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.vision_tower.register_forward_pre_hook(self._broken)

    @staticmethod
    def _broken(*_: Any) -> None:
        raise ValueError("no such kernel")


def test_why_a_norm_is_not_run_is_said(tmp_path: Path) -> None:
    config = _into_layer_norms().config
    source = _save(lambda: WithABrokenTowerModel(config), tmp_path / "source")
    plan = normconvert.inspect(source, model_class=WithABrokenTowerModel).plan
    reasons = {v.reason for v in plan.verdicts if v.norm.startswith("model.vision_tower.")}
    assert reasons == {
        "no pass of the trace runs it: The forward pass of CLIPVisionModel cannot be traced: "
        "ValueError: no such kernel"
    }
    assert plan.notes == (
        "2 passes of the trace could not be run (model.vision_tower, model.get_image_features): "
        "what only they show is not known.",
    )


def test_a_tower_for_images_of_no_known_size_is_named(tmp_path: Path) -> None:
    source = _save(_into_layer_norms, tmp_path / "source")
    with patch("normconvert.towers._shapes", side_effect=normconvert.TraceError("Of no size.")):
        plan = normconvert.inspect(source).plan
    (note,) = plan.notes
    assert note.startswith("1 pass of the trace could not be run (model.vision_tower): ")
    (reason,) = {v.reason for v in plan.verdicts if v.norm.startswith("model.vision_tower.")}
    assert reason.endswith(": TraceError: Of no size")
