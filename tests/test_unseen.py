"""What else than a plain input writes to the stream: other inputs, which the trace may not use.

A centered model must compute the same on them, or it must not be made.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import normconvert
import zoo
from normconvert.precision import float64
from normconvert.source import open_checkpoint
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


def test_what_cannot_be_shut_out_is_refused(tmp_path: Path) -> None:
    source = save(_fuyu, tmp_path / "source")
    with pytest.raises(
        normconvert.PlanError,
        match=r"vision_embed_tokens\.weight, which was not read in the trace, may write to it",
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
