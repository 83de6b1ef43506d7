"""Images in a model of text: the tower, the projector, and what the text model makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import normconvert
import zoo

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
    with patch("normconvert.rules.stream.unseen_writers", return_value=()):
        wrong = normconvert.convert(source, tmp_path / "wrong", "rmsnorm")
    assert wrong.status == "rejected"
    assert _apart(wrong.verification) == {"images in a text"}
    right = normconvert.convert(source, tmp_path / "output", "rmsnorm")
    assert right.status == "converted"
    assert _apart(right.verification) == set()


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
