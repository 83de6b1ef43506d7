"""Norms are told by what they compute: every convention found, every impostor turned away."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from normconvert.trace.recognise import Formula, recognise

if TYPE_CHECKING:
    from normconvert.ir.graph import NormKind

WIDTH = 12


def formula(
    kind: NormKind,
    gain: str | None = "weight",
    bias: str | None = None,
    offset: float = 0.0,
    eps: float = 1e-5,
) -> Formula:
    return Formula(kind=kind, gain=gain, bias=bias, offset=offset, eps=eps)


class Swapped(nn.Module):
    """An RMSNorm whose parameters are named the other way round, and whose class says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(WIDTH))
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 3e-3).rsqrt() * self.bias + self.weight


class GainFirstRMSNorm(nn.Module):
    """Called RMSNorm, but its gain comes before the normalization: no gain to fold."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.weight
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class InverseRMS(nn.Module):
    """Called a norm in some models, returns only the reciprocal root."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class Clamped(nn.Module):
    """x over its RMS, but at least epsilon: a norm for large inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-3)


class InPlace(nn.Module):
    """Right in its result, but it overwrites its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_((x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).mul_(self.weight)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (LlamaRMSNorm(WIDTH, 1e-6), formula("rmsnorm", eps=1e-6)),
        (LlamaRMSNorm(WIDTH, 0.0), formula("rmsnorm", eps=0.0)),
        (LlamaRMSNorm(WIDTH, 0.25), formula("rmsnorm", eps=0.25)),
        (GemmaRMSNorm(WIDTH), formula("rmsnorm", offset=1.0, eps=1e-6)),
        (T5LayerNorm(WIDTH), formula("rmsnorm", eps=1e-6)),
        (nn.RMSNorm(WIDTH, eps=1e-3), formula("rmsnorm", eps=1e-3)),
        (nn.LayerNorm(WIDTH), formula("layernorm", bias="bias")),
        (nn.LayerNorm(WIDTH, bias=False, eps=1e-12), formula("layernorm", eps=1e-12)),
        (nn.LayerNorm(WIDTH, elementwise_affine=False), formula("layernorm", None, offset=1.0)),
        (OlmoLayerNorm(WIDTH), formula("layernorm", None, offset=1.0)),
        (NemotronLayerNorm1P(WIDTH), formula("layernorm", bias="bias", offset=1.0)),
        (CohereLayerNorm((4, WIDTH)), formula("layernorm")),
        (Swapped(), formula("rmsnorm", gain="bias", bias="weight", eps=3e-3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_norms_are_recognised(module: nn.Module, expected: Formula) -> None:
    assert recognise(module.eval(), (2, 7, 4, WIDTH)) == expected


@pytest.mark.parametrize(
    "module",
    [GainFirstRMSNorm(), Clamped(), Zamba2RMSNormGated(WIDTH, 4)],
    ids=lambda module: type(module).__name__,
)
def test_what_only_resembles_a_norm_is_unrecognised(module: nn.Module) -> None:
    found = recognise(module.eval(), (2, 7, WIDTH))
    assert found is not None
    assert (found.kind, found.gain) == ("unrecognised", None)


@pytest.mark.parametrize(
    "module",
    [
        InverseRMS(),
        InPlace(),
        nn.Linear(WIDTH, WIDTH),
        nn.PReLU(WIDTH),
        nn.SiLU(),
        nn.Softmax(-1),
        nn.Identity(),
        nn.Dropout(0.5),
        nn.BatchNorm1d(7),
        nn.Sequential(nn.LayerNorm(WIDTH)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_are_no_norms(module: nn.Module) -> None:
    assert recognise(module.eval(), (2, 7, WIDTH)) is None


def test_recognition_leaves_the_module_alone() -> None:
    module = nn.LayerNorm(WIDTH)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    recognise(module, (2, 7, WIDTH))
    assert all(torch.equal(before[name], p) for name, p in module.named_parameters())
    assert all(p.dtype is torch.float32 for p in module.parameters())
