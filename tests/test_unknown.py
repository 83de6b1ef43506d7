"""What no rule knows is kept, with that as the reason, and counted: nothing is lost in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

import normconvert
import zoo
from normconvert.cli.show import show_conversion, show_inspection


def rolled(x: torch.Tensor) -> torch.Tensor:
    """Cyclic shifts of the features: no rule knows the operation."""
    return torch.roll(x, 1, -1)


def squashed(x: torch.Tensor) -> torch.Tensor:
    """Known to pass no gain on."""
    return torch.tanh(x)


class RolledLlama(LlamaForCausalLM):  # type: ignore[misc]
    function = staticmethod(rolled)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.register_forward_pre_hook(lambda _, args: (self.function(args[0]),))


class SquashedLlama(RolledLlama):
    function = staticmethod(squashed)


class RolledGPT2(GPT2LMHeadModel):  # type: ignore[misc]
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.transformer.drop = torch.nn.Identity()
        self.transformer.drop.register_forward_hook(lambda _, args, output: rolled(output))


def saved(name: str, folder: Path) -> Path:
    zoo.save(name, folder)
    return folder


def test_an_operation_that_is_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved("llama", tmp_path / "source")
    inspection = normconvert.inspect(source, model_class=RolledLlama)
    norms = [f"model.layers.{layer}.post_attention_layernorm" for layer in range(3)]
    assert [verdict.norm for verdict in inspection.plan.unknown] == norms
    assert all("roll" in verdict.reason for verdict in inspection.plan.unknown)
    assert inspection.to_json()["plan"]["verdicts"][1]["unknown"]
    sentence = "3 norms stay because normconvert does not know an operation or a structure"
    show_inspection(inspection)
    assert sentence in capsys.readouterr().out
    show_conversion(normconvert.convert(source, tmp_path / "output", model_class=RolledLlama))
    assert sentence in capsys.readouterr().out


@pytest.mark.parametrize("model_class", [SquashedLlama, LlamaForCausalLM])
def test_what_is_known_is_not_counted(
    model_class: type[PreTrainedModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspection = normconvert.inspect(saved("llama", tmp_path / "source"), model_class=model_class)
    assert bool(inspection.plan.kept("flashnorm")) == (model_class is SquashedLlama)
    assert not inspection.plan.unknown
    show_inspection(inspection)
    assert "does not know" not in capsys.readouterr().out


def test_a_stream_through_an_operation_that_is_not_known(tmp_path: Path) -> None:
    source = saved("gpt2_untied", tmp_path / "source")
    inspection = normconvert.inspect(source, model_class=RolledGPT2)
    assert inspection.rmsnorm is not None
    unknown = [verdict for verdict in inspection.rmsnorm.unknown if verdict.rule == "rmsnorm"]
    assert len(unknown) + len(inspection.rmsnorm.changed("rmsnorm")) == 7
    known = normconvert.inspect(source).rmsnorm
    assert known is not None
    assert not known.unknown
