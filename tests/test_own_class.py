"""Model classes that transformers does not know: the user's own, or broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import normconvert
import zoo
from command_line import environment, run


class OwnNorm(torch.nn.Module):
    """RMSNorm with an eps and a gain, 1 + w, that the configuration does not know of."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-4) * (1 + self.weight)


class OwnConfig(LlamaConfig):  # type: ignore[misc]
    """Registered with nothing."""

    model_type = "own_of_a_package"


class OwnForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """A Llama with another final norm."""

    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.model.norm = OwnNorm(config.hidden_size)


class OwnMLP(LlamaMLP):  # type: ignore[misc]
    """Adds its input again, but only for a single token of several texts: no pass is such."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = super().forward(x)
        return output + x if x.shape[1] == 1 < len(x) else output


class OwnStepForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = OwnMLP(config)


class OwnCastForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """Chooses a dtype for a part of itself while it is built."""

    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.model.layers[0].mlp.to(torch.float32)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    zoo.save("llama", tmp_path / "own", dtype="float32")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    config |= {"model_type": "own_of_a_package", "architectures": ["OwnForCausalLM"]}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    return tmp_path / "own"


def test_a_class_of_the_users_package(own: Path, tmp_path: Path) -> None:
    for call in (normconvert.inspect, normconvert.convert):
        with pytest.raises(normconvert.TraceError, match="own_of_a_package"):
            call(own)
    options: dict[str, Any] = {"model_class": OwnForCausalLM}
    plan = normconvert.inspect(own, **options).plan
    assert {verdict.norm: verdict.offset for verdict in plan.verdicts}["model.norm"] == 1.0
    conversion = normconvert.convert(own, tmp_path / "output", **options)
    assert conversion.status == "converted"
    assert conversion.inspection.plan == plan
    before, after = (load_file(each / "model.safetensors") for each in (own, tmp_path / "output"))
    assert (after["model.norm.weight"] == 0).all()
    gain = 1 + before["model.norm.weight"].double()
    head = (before["lm_head.weight"].double() * gain).float()
    assert torch.equal(after["lm_head.weight"], head)
    report = normconvert.verify_equivalence(own, tmp_path / "output", **options)
    assert report.equivalent
    assert report.certificate is not None
    assert report.certificate.valid
    manifest = json.loads((tmp_path / "output" / "normconvert.json").read_text())
    assert manifest["source"]["model_class"] == f"{__name__}.OwnForCausalLM"
    with pytest.raises(normconvert.PlanError, match="OwnForCausalLM is your own class"):
        normconvert.convert(own, tmp_path / "native", format="native", **options)


def test_a_step_that_is_not_like_a_pass(own: Path, tmp_path: Path) -> None:
    conversion = normconvert.convert(own, tmp_path / "output", model_class=OwnStepForCausalLM)
    assert conversion.status == "rejected"
    assert conversion.verification is not None
    found = {each.tokens: each.equivalent for each in conversion.verification.comparisons}
    assert found == {"random": True, "token by token": False}
    assert not (tmp_path / "output").exists()


def test_a_part_that_is_cast_while_it_is_built(own: Path, tmp_path: Path) -> None:
    conversion = normconvert.convert(own, tmp_path / "output", model_class=OwnCastForCausalLM)
    assert conversion.status == "converted"
    assert len(conversion.inspection.plan.folded) == len(conversion.inspection.plan.verdicts)


def test_code_that_cannot_be_imported(own: Path, tmp_path: Path) -> None:
    config = json.loads((own / "config.json").read_text())
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (own / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    (own / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_of_a_package'\n"
    )
    (own / "modeling_own.py").write_text("raise RuntimeError('made for another release')\n")
    modules = environment(HF_MODULES_CACHE=str(tmp_path / "modules"))
    result = run("flashnorm", own, "--trust-remote-code", cwd=tmp_path, env=modules)
    result.assert_refused("modeling_own.OwnForCausalLM", "made for another release")
    (own / "configuration_own.py").write_text("import a_package_that_nobody_has\n")
    result = run("inspect", own, "--trust-remote-code", cwd=tmp_path, env=modules)
    result.assert_refused("a_package_that_nobody_has")
    assert not (tmp_path / "own-flashnorm").exists()
