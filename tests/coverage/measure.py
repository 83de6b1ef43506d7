"""What the rewrites do to one tiny model, and how exactly: a row of docs/coverage.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
from torch.utils._pytree import tree_leaves

import normconvert
from normconvert.ir.event import ignore
from normconvert.ir.plan import Verdict
from normconvert.planner import make_plan
from normconvert.precision import float64
from normconvert.rewrite import write
from normconvert.settle import Request, settle
from normconvert.source import Checkpoint, open_checkpoint
from normconvert.trace import trace
from normconvert.verify.decoding import stepwise_logits
from normconvert.verify.loading import load_model
from normconvert.verify.tokens import input_sets
from normconvert.verify.towers import tower_outputs

_LENGTH = 11
REWRITES: tuple[Any, ...] = ("flashnorm", "rmsnorm", "crmsnorm")
SENTENCE = re.compile(r"[A-Z~/'].*\.", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model. `error` is the largest one relative to the largest output, over all rewrites."""

    name: str
    model: str
    norms: str
    folded: str
    kept: tuple[str, ...]
    rmsnorm: str
    crmsnorm: str
    error: float

    def cells(self) -> list[str]:
        """The row of the table, but for the error."""
        kept = "<br>".join(self.kept)
        return [self.name, self.model, self.norms, self.folded, self.rmsnorm, self.crmsnorm, kept]


def request(rewrite: Any) -> Request:
    """One rewrite, in the format that it has by default, with everything else left as it is."""
    return Request(
        rewrites=(rewrite,),
        format="stock" if rewrite == "flashnorm" else "native",
        tied="keep",
        dtype="keep",
        fraction=1.0,
    )


def measure(name: str, folder: Path, *, compare: bool = True) -> Row:
    """Save the model called `name`, convert the checkpoint with what applies, and compare.

    Without `compare` it is only planned what would be converted, and the error is 0.

    Raises:
        AssertionError: something is refused without a sentence.
    """
    tiny.save(name, folder / "source")
    source = open_checkpoint(str(folder / "source"))
    try:
        graph = trace(source)
    except normconvert.TraceError as error:
        return Row(
            name=name, model="", norms="not traced", folded="", kept=(_refusal(error, source),),
            rmsnorm="", crmsnorm="", error=0.0,
        )  # fmt: skip
    plan = make_plan(graph, source, ("flashnorm",))
    layer_norms = any(verdict.kind == "layernorm" for verdict in plan.verdicts)
    inputs, before = _run(source) if compare else ({}, torch.empty(0))
    results, errors = {}, [0.0]
    for rewrite in REWRITES if layer_norms else REWRITES[:1]:
        try:
            converted, _ = settle(graph, source, request(rewrite))  # the trace is most of the time
        except normconvert.NormconvertError as error:
            results[rewrite] = _refusal(error, source)
            continue
        if compare:
            output = folder / rewrite
            output.mkdir()
            write(converted, source, output, {}, ignore)
            _, after = _run(open_checkpoint(str(output)), inputs)
            errors.append(float((after - before).abs().max() / before.abs().max()))
        asked = [verdict for verdict in converted.verdicts if verdict.rule == rewrite]
        count = sum(verdict.kind == "layernorm" for verdict in asked)
        results[rewrite] = f"{len(converted.changed(rewrite))} of {count}"
    return Row(
        name=name,
        model=plan.model,
        norms=", ".join(_formulas(plan.verdicts)),
        folded=f"{len(plan.folded)} of {len(plan.verdicts)}",
        kept=tuple(_kept(plan.kept("flashnorm"))),
        rmsnorm=results.get("rmsnorm", "-"),
        crmsnorm=results.get("crmsnorm", "-"),
        error=max(errors),
    )


def _run(
    checkpoint: Checkpoint, inputs: dict[str, Any] | None = None
) -> tuple[dict[str, Any], torch.Tensor]:
    """What the model of `checkpoint` computes of random inputs, in float64, and the inputs.

    Of text, also of one beyond all windows, and token by token with a cache and padding.
    """
    model = load_model(checkpoint, torch.float64, trust_remote_code=False)
    if inputs is None:
        sets, _ = input_sets(model, checkpoint, None, trust_remote_code=False)
        inputs = {
            key: value[:, :_LENGTH] if getattr(value, "dtype", None) is torch.int64 else value
            for key, value in list(sets.values())[-1].items()
        }
    with torch.no_grad(), float64():
        output = model(**inputs)
        found = [getattr(output, "logits", output[0])]
        found += [each for each in [getattr(output, "pooler_output", None)] if each is not None]
        for output in tower_outputs(model).values():
            found += floats(output)
    if "input_ids" in inputs and "decoder_input_ids" not in inputs:
        ids = inputs["input_ids"].repeat(1, 5)
        for run in (lambda: model(ids).logits, lambda: stepwise_logits(model, ids)):
            with torch.no_grad(), float64(), suppress(Exception):  # not so long, or no cache
                found.append(run())
    return inputs, torch.cat([each.flatten() for each in found])


def floats(output: Any) -> list[torch.Tensor]:
    """All numbers that a model returned."""
    leaves = (each for each in tree_leaves(output) if isinstance(each, torch.Tensor))
    return [each for each in leaves if each.is_floating_point()]


def _refusal(error: Exception, source: Checkpoint) -> str:
    if not SENTENCE.fullmatch(str(error)):
        raise AssertionError(f"no sentence: {error}")
    return starred(str(error).replace(source.model, "it"))


def _formulas(verdicts: Iterable[Verdict]) -> list[str]:
    counts: Counter[str] = Counter()
    for verdict in verdicts:
        gain = ("1+w" if verdict.offset else "w") if verdict.gain else ""
        parts = [{"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}.get(verdict.kind, "unknown")]
        parts += [part for part in (gain, "b" if verdict.bias else "") if part]
        counts[" ".join(parts)] += 1
    return [f"{count} {formula}" for formula, count in counts.items()]


def _kept(verdicts: Iterable[Verdict]) -> list[str]:
    return list(dict.fromkeys(starred(f"`{v.norm}`: {v.reason}") for v in verdicts))


def starred(text: str) -> str:
    """With * for the number of a layer."""
    return re.sub(r"(?<=\.)\d+(?=[.`\s,]|$)", "*", text)
