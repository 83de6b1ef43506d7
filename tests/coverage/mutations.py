"""Right conversions and wrong ones: does the certificate know them, does comparing the outputs?

Each model is converted by every rewrite that applies. The conversion as it is has to pass. Then one
edit is left out, or one element that an edit wrote is moved, and neither may pass. What comparing
the outputs can see depends on the dtype: in 16 bits the noise floor hides most single elements.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tiny
import torch
from measure import REWRITES, floats, request
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves

from normconvert.errors import NormconvertError
from normconvert.ir.event import ignore
from normconvert.ir.graph import Graph
from normconvert.ir.plan import Plan
from normconvert.precision import float64
from normconvert.rewrite import write
from normconvert.settle import settle
from normconvert.source import Checkpoint, open_checkpoint
from normconvert.trace import trace
from normconvert.verify import certify, logits
from normconvert.verify.loading import load_model
from normconvert.verify.tokens import input_sets
from normconvert.verify.towers import tower_outputs

MOVED_BY = 2.0**-7  # of the element: its last place, were it stored in bfloat16
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What the verification says of one conversion of the model `name`, stored in `dtype`.

    `kind` is "exact" for the conversion as it is, else what was done to `tensor`. `certificate` and
    `outputs` are whether these passed it. `effect` is the largest difference of the outputs from
    those of the exact conversion, both computed in float64, relative to the largest output. Where
    the outputs were not compared, both of these are None.
    """

    name: str
    dtype: str
    rewrite: str
    kind: str
    tensor: str
    effect: float | None
    certificate: bool
    outputs: bool | None


def judge(
    name: str, dtype: torch.dtype, folder: Path, *, compare_wrong: bool
) -> Iterator[Judgement]:
    """Judge the exact and the wrong conversions of the model called `name`, stored in `dtype`.

    Nothing is judged if it cannot be converted. The outputs of the wrong ones are compared only if
    `compare_wrong` says so.
    """
    tiny.build(name).to(dtype).save_pretrained(folder / "source")
    source = open_checkpoint(str(folder / "source"))
    try:
        graph = trace(source)
    except NormconvertError:
        return
    with _remembering():
        yield from _judgements(name, dtype, folder, source, graph, compare_wrong)


def _judgements(
    name: str,
    dtype: torch.dtype,
    folder: Path,
    source: Checkpoint,
    graph: Graph,
    compare_wrong: bool,
) -> Iterator[Judgement]:
    for rewrite in REWRITES:
        try:
            plan, _ = settle(graph, source, request(rewrite))
        except NormconvertError:
            continue
        output = folder / rewrite
        output.mkdir()
        write(plan, source, output, {"plan": plan.to_json()}, ignore)
        case = _Case(name, str(dtype).removeprefix("torch."), rewrite, plan, source, output)
        yield case.judged_exact()
        if compare_wrong:
            _ = case.right_outputs  # before anything is wrong
        right = load_file(output / WEIGHTS)
        before = load_file(source.folder / WEIGHTS)
        for kind, tensor, wrong in _wrong(name, plan, before, right):
            save_file({**right, tensor: wrong}, output / WEIGHTS, metadata={"format": "pt"})
            yield case.judged_wrong(kind, tensor, compared=compare_wrong)


@dataclass(frozen=True)
class _Case:
    """One conversion, whose output a mutation may replace."""

    name: str
    dtype: str
    rewrite: str
    plan: Plan
    source: Checkpoint
    output: Path

    def judged_exact(self) -> Judgement:
        converted = open_checkpoint(str(self.output))
        return self._judgement("exact", "", 0.0, converted, self._equivalent(converted))

    def judged_wrong(self, kind: str, tensor: str, *, compared: bool) -> Judgement:
        converted = open_checkpoint(str(self.output))
        if not compared:
            return self._judgement(kind, tensor, None, converted, None)
        effect = max(
            float((a - b).abs().max() / a.abs().max())
            for a, b in zip(self.right_outputs, _outputs(converted), strict=True)
        )
        return self._judgement(kind, tensor, effect, converted, self._equivalent(converted))

    @cached_property
    def right_outputs(self) -> tuple[torch.Tensor, ...]:
        return _outputs(open_checkpoint(str(self.output)))

    def _judgement(
        self,
        kind: str,
        tensor: str,
        effect: float | None,
        converted: Checkpoint,
        outputs: bool | None,
    ) -> Judgement:
        return Judgement(
            name=self.name,
            dtype=self.dtype,
            rewrite=self.rewrite,
            kind=kind,
            tensor=tensor,
            effect=effect,
            certificate=certify(self.plan, self.source, converted, ignore).valid,
            outputs=outputs,
        )

    def _equivalent(self, converted: Checkpoint) -> bool:
        return logits.compare(
            self.source,
            converted,
            text=None,
            dtype=None,
            returns=(),
            certificate=None,
            algebra=None,
            centered="rmsnorm" in self.plan.rules,
            trust_remote_code=False,
            listen=ignore,
        ).equivalent


@contextmanager
def _remembering() -> Iterator[None]:
    """Inside, no model computes the same twice: most of what a comparison runs, others have run.

    The original is run once, and with each noise once. What models write, which says nothing in
    the verdict, is what the first one writes.
    """
    known: dict[object, Any] = {}

    def once(run: Callable[..., Any], key: Callable[..., object]) -> Callable[..., Any]:
        def remembered(*given: Any) -> Any:
            place = key(*given)
            if place not in known:
                known[place] = run(*given)
            return known[place]

        return remembered

    with ExitStack() as patches:
        for owner, attribute, key in (
            (logits._Runner, "outputs", lambda _, *given: _digest(*given)),
            (logits, "continuation", lambda *_: "what is written"),
        ):
            remembered = once(getattr(owner, attribute), key)
            patches.enter_context(patch.object(owner, attribute, remembered))
        yield


def _digest(model: Any, *inputs: Any) -> bytes:
    """Of all that says what a model computes of its inputs."""
    found = hashlib.sha256(f"{type(model)} {model.config}".encode())
    for tensor in tree_leaves([dict(model.state_dict(keep_vars=False)), inputs]):
        if isinstance(tensor, torch.Tensor):
            found.update(f"{tensor.shape} {tensor.dtype}".encode())
            found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.digest()


def _wrong(
    name: str,
    plan: Plan,
    before: Mapping[str, torch.Tensor],
    right: Mapping[str, torch.Tensor],
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """The kind of mutation, the tensor and what it becomes.

    An edit can only be left out where the tensor was there before, in the same shape; of a norm's
    gain that becomes 1 by being 1, leaving it out is no fault.
    """
    choose = random.Random(name)
    edited = [edit.tensor for edit in plan.edits]
    kept = [
        each
        for each in edited
        if each in before
        and before[each].shape == right[each].shape
        and not torch.equal(before[each], right[each])
    ]
    if kept:
        tensor = choose.choice(kept)
        yield "edit left out", tensor, before[tensor]
    tensor = choose.choice([each for each in edited if bool((right[each] != 0).any())])
    moved = right[tensor].clone()
    elements = moved.view(-1)
    index = choose.choice(elements.nonzero().flatten().tolist())
    elements[index] *= 1 + MOVED_BY
    yield "element moved", tensor, moved


def _outputs(checkpoint: Checkpoint) -> tuple[torch.Tensor, ...]:
    """What is compared, of the model of `checkpoint`: its logits, or its last hidden states."""
    model = load_model(checkpoint, torch.float64, trust_remote_code=False)
    sets, _ = input_sets(model, checkpoint, None, trust_remote_code=False)
    with torch.no_grad(), float64():
        outputs: list[Any] = [model(**inputs) for inputs in sets.values()]
        found = [getattr(output, "logits", output[0]) for output in outputs]
        pooled = [getattr(output, "pooler_output", None) for output in outputs]
        found += [each for each in pooled if each is not None]
        for output in tower_outputs(model).values():
            found += floats(output)
    return tuple(found)
