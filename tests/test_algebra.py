"""The algebra level: right rewrites agree before rounding, a wrong one is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

import normconvert
import zoo
from normconvert.api import Rewrite
from normconvert.ir.expression import Center, Scale
from normconvert.ir.plan import Plan
from normconvert.ir.report import Algebra
from normconvert.planner import modules_of
from normconvert.source import open_checkpoint
from normconvert.trace import trace
from normconvert.verify import check_sites
from zoo_layernorm import LAYERNORM

NAMES = ("llama_tied", "gemma2", "mixtral", "gpt_oss", "deepseek_v3", "gpt2", "olmo", "phimoe")
CASES: list[tuple[str, Rewrite]] = [(name, "flashnorm") for name in NAMES if name != "olmo"]
CASES += [(name, "rmsnorm") for name in NAMES if name in LAYERNORM]
CASES += [(name, "crmsnorm") for name in (*LAYERNORM,) if name in (*NAMES, "vit", "whisper")]


def converted(name: str, rewrite: Rewrite, folder: Path) -> Plan:
    """In bfloat16, so that rounding would show."""
    zoo.save(name, folder / "source", dtype="bfloat16")
    convert = normconvert.convert
    report = convert(folder / "source", folder / "output", rewrite, tied="untie", verify=False)
    return report.inspection.plan


def algebra(plan: Plan, folder: Path) -> Algebra:
    pair = (open_checkpoint(str(folder / place)) for place in ("source", "output"))
    source, output = pair
    return check_sites(plan, source, output, modules_of(trace(source)), trust_remote_code=False)


@pytest.mark.parametrize(("name", "rewrite"), CASES)
def test_every_site_agrees(name: str, rewrite: Rewrite, tmp_path: Path) -> None:
    plan = converted(name, rewrite, tmp_path)
    found = algebra(plan, tmp_path)
    assert found.valid
    assert max(site.error for site in found.sites) < 1e-13
    changed = {verdict.norm for rule in plan.rules for verdict in plan.changed(rule)}
    assert {site.norm for site in found.sites} == changed


@pytest.mark.parametrize("kind", [Scale, Center])
def test_a_wrong_expression_is_named(kind: type, tmp_path: Path) -> None:
    """One edit that a wrong rule would have made otherwise."""
    plan = converted("phimoe", "rmsnorm", tmp_path)
    edits = [edit for edit in plan.edits if type(edit.expression) is kind and len(edit.shape) == 2]
    victim = Random(0).choice([edit for edit in edits if ".layers.1." in edit.tensor])
    assert isinstance(victim.expression, (Scale, Center))
    wrong = replace(victim, expression=victim.expression.of)
    broken = replace(plan, edits=tuple(wrong if edit is victim else edit for edit in plan.edits))
    found = algebra(broken, tmp_path)
    assert not found.valid
    layers = [site.norm for site in found.sites if site.error > found.tolerance]
    assert all(".0." not in norm for norm in layers)
    if kind is Scale:
        verdicts = [verdict for verdict in plan.verdicts if verdict.norm == layers[0]]
        assert any(victim.tensor in verdict.readers for verdict in verdicts)
