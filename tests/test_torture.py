"""Every way a gain may or may not be read: what folds is exact, what cannot fold is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import normconvert
import torture
from normconvert.precision import float64

EXACT = 1e-12  # of the largest logit, in float64


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, batch: int = 3, length: int = 11) -> torch.Tensor:
    """Neither size is the one that a model is traced with."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, torture.VOCABULARY, (batch, length), generator=generator)
    with float64():
        found: torch.Tensor = model(ids).logits
    return found


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


@pytest.mark.parametrize("name", torture.CASES)
def test_case(name: str, tmp_path: Path) -> None:
    case = torture.CASES[name]
    source, output = tmp_path / "source", tmp_path / "output"
    torture.save(name, source)
    original = load(source)
    reference = logits(original)
    assert reference.isfinite().all()
    try:
        conversion = normconvert.convert(
            source, output, tied="untie" if case.untie else "keep", verify=False
        )
    except (normconvert.PlanError, normconvert.TraceError):
        assert not case.folds
        assert not output.exists()
        return
    plan = conversion.inspection.plan
    assert distance(reference, logits(load(output))) <= EXACT
    folded = {verdict.norm for verdict in plan.folded}
    assert case.folds is None or folded == case.folds
    if case.slots is not None:
        bias = load(output).get_parameter("biased.bias")
        assert case.slots == bool((bias == 0).all())
    for path in folded:
        assert is_felt(original, path, reference), path


def is_felt(model: PreTrainedModel, path: str, reference: torch.Tensor) -> bool:
    """Whether the gain of the norm `path` matters: without that, a wrong fold could pass."""
    gain = model.get_parameter(f"{path}.weight")
    drawn = gain.detach().clone()
    torch.nn.init.ones_(gain)
    moved = distance(reference, logits(model))
    with torch.no_grad():
        gain.copy_(drawn)
    return moved > 1e-3


def test_what_no_trace_shows_is_rejected(tmp_path: Path) -> None:
    """Neither a short nor a long input takes that path: that is what verifying is for."""
    source, output = tmp_path / "source", tmp_path / "output"
    torture.save("something_else_for_middling_inputs", source)
    conversion = normconvert.convert(source, output)
    assert conversion.status == "rejected"
    assert not output.exists()
