"""A training step: forward, backward and SGD."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from normconvert.benchmark.models import nbytes, without_norms
from normconvert.benchmark.passes import inputs_of, random_ids, writes_text
from normconvert.benchmark.rounds import Stopwatch, stopwatch
from normconvert.errors import BenchError, NormconvertError
from normconvert.ir.bench import CEILING, ORIGINAL
from normconvert.train import as_crmsnorm, as_rmsnorm
from normconvert.verify.placement import free_memory

TOKENS = 128
_VARIANTS = {"as_rmsnorm": as_rmsnorm, "as_crmsnorm": as_crmsnorm}


def trained(
    model: Any, paths: tuple[str, ...], *, layer_norms: bool
) -> tuple[dict[str, Any], str | None]:
    """`model` and copies of it to train, by their names, and if some are missing, why.

    As it is; if it has `layer_norms`, as `normconvert.train` changes it; without the norms at
    `paths`. Dropout is turned off in all, because on a stream it forbids the change.

    Raises:
        BenchError: they do not fit into memory.
    """
    variants = _VARIANTS if layer_norms else {}
    needed = (len(variants) + 2) * nbytes(model)  # of one at a time the gradients
    if model.device.type == "cpu" and needed > (free := free_memory()):
        raise BenchError(
            f"Training takes {needed / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are free."
        )
    for module in model.train().modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    changed = {name: _changed(model, change) for name, change in variants.items()}
    refused = [f"{name}: {each}" for name, each in changed.items() if isinstance(each, str)]
    changed = {name: each for name, each in changed.items() if not isinstance(each, str)}
    ceiling = without_norms(model, paths)
    return {ORIGINAL: model, **changed, CEILING: ceiling}, " ".join(refused) or None


def _changed(model: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of `model` that `change` has changed, or why it refuses to."""
    try:
        return change(copy.deepcopy(model))
    except NormconvertError as error:
        return str(error)


def step(model: Any, length: int) -> Stopwatch:
    """One step on `length` tokens, or on what else the model reads."""
    if writes_text(model):
        ids = random_ids(model, length)
        inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    else:
        inputs = inputs_of(model, length)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def run() -> None:
        output = model(**inputs)
        loss = output["loss"] if "loss" in output else output[0].square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return stopwatch(run, model.device)
