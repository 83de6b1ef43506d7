"""Tracing a model that is in memory already, in training or in evaluation.

The leaves of its graph are its own parameters, by their names. A parameter that two modules share
is one leaf, which both read.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeCopyMode
from torch.overrides import TorchFunctionMode

from normconvert.quiet import quiet
from normconvert.trace.tracer import fake_tensors, record, recorded

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from normconvert.ir.graph import Graph
    from normconvert.trace.recorder import Recorder


def trace_model(
    model: PreTrainedModel,
    change: Callable[[PreTrainedModel], object] | None = None,
    *,
    training: bool,
) -> Graph:
    """The graph of one forward pass of `model`, or of a copy that `change` has changed.

    The copy is on fake tensors: neither `model` nor its memory is touched. With `training`, what
    a module does in training only (dropout) is in the graph.

    Raises:
        TraceError: it cannot be run.
    """
    with torch.random.fork_rng(devices=[]):  # what the fake model draws, the real one must not miss
        return recorded(partial(_trace, model, change, training))


def _trace(
    model: PreTrainedModel,
    change: Callable[[PreTrainedModel], object] | None,
    training: bool,
    recorder: Recorder,
    *,
    optional: bool = False,
) -> Graph:
    fake = fake_tensors()
    with quiet(), torch.no_grad():
        with FakeCopyMode(fake):
            twin = deepcopy(model)
        with fake, _NoLayerDropped():
            twin.train(training)
            _make_plain(twin)
            if change is not None:
                change(twin)
            named = tuple(twin.named_parameters())
            leaves = tuple((name, recorder.new_value(parameter)) for name, parameter in named)
            return record(twin, recorder, leaves, (), further=True, optional=optional)


def _make_plain(model: PreTrainedModel) -> None:
    """Choose the implementations whose operations are the plainest."""
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False


class _NoLayerDropped(TorchFunctionMode):
    """Every random number is 1 where one alone is asked for: LayerDrop then runs every layer.

    Whatever it skips is one summand less of a stream; the trace must see them all.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.rand and args in (([],), ((),)):
            return torch.tensor(1.0)  # its value is known even to the fake mode
        return func(*args, **(kwargs or {}))
