"""One forward pass on fake tensors, recorded."""

from __future__ import annotations

import re
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import keystr, tree_leaves_with_path
from transformers import Cache, PreTrainedModel

from normconvert.errors import TraceError, first_line
from normconvert.model_inputs import optional_inputs, trace_inputs
from normconvert.trace.caches import forgetting
from normconvert.trace.casting import casting_anew
from normconvert.trace.naming import readable_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from normconvert.trace.calls import NormCalls
    from normconvert.trace.recorder import Recorder

BATCH, LENGTH = 2, 7
"""Sizes that no model dimension has, so that an axis can be told from its size."""


def plain_pass(
    model: PreTrainedModel,
    recorder: Recorder,
    calls: NormCalls,
    *,
    length: int = LENGTH,
    optional: bool = False,
    **options: Any,
) -> list[tuple[str, int]]:
    """One plain forward pass, recorded: the name and the value of all that it returns."""
    shape = (BATCH, length)
    with as_trace_errors(model, recorder):
        with torch.device(model.device):
            inputs = trace_inputs(model, *shape)
        output = output_of(model, recorder, calls, inputs | options, shape if optional else None)
    return values_of(model, recorder, output)


def output_of(
    model: PreTrainedModel,
    recorder: Recorder,
    calls: NormCalls,
    inputs: dict[str, Any],
    optional: tuple[int, int] | None = None,
    run: Callable[..., Any] | None = None,
) -> Any:
    """What one forward pass on `inputs`, or another `run` of `model`, returns; it is recorded.

    With `optional`, the batch and the length, every part of the model gets what it can do without.
    """
    for name, given in inputs.items():
        if isinstance(given, torch.Tensor) and given.is_floating_point():
            inputs[name] = given.to(model.dtype)
    more = _handing_in(model, *optional) if optional else nullcontext()
    recorder.computes = recorder.invents or any(map(_is_known, inputs.values()))
    with forgetting(model), readable_numbers(), casting_anew(), more, calls, recorder:
        return (run or model)(**inputs)


@contextmanager
def as_trace_errors(model: PreTrainedModel, recorder: Recorder) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the model's own code may raise anything
        raise TraceError(
            f"The forward pass of {type(model).__name__} cannot be traced: {first_line(error)}.",
            module=recorder.module,
        ) from error


def _is_known(given: Any) -> bool:
    return isinstance(given, torch.Tensor) and not isinstance(given, FakeTensor)


def values_of(
    model: PreTrainedModel,
    recorder: Recorder,
    output: Any,
    fields: Collection[str] | None = None,
) -> list[tuple[str, int]]:
    """The name and the value of all tensors in what `model` returned, or in these `fields` of it.

    Raises:
        TraceError: there may be tensors that cannot be found.
    """
    found = []
    for path, leaf in tree_leaves_with_path(output):
        name = ".".join(re.findall(r"\w+", keystr(path)))
        if fields is not None and field(name) not in fields:
            continue
        if isinstance(leaf, torch.Tensor):
            found.append((name, recorder.value(leaf)))
        elif not isinstance(leaf, _SEEN_THROUGH):
            raise TraceError(
                f"{type(model).__name__} returns a {type(leaf).__name__}, and what tensors that "
                "holds is not known; let it return a ModelOutput, a dict or a tuple."
            )
    return found


def field(name: str) -> str:
    """Of which field an output is: its name, without the numbers of its elements."""
    return re.sub(r"\.\d+\b", "", name)


_SEEN_THROUGH = (bool, int, float, str, type(None), Cache)  # no tensors, or only a cache's


@contextmanager
def _handing_in(model: PreTrainedModel, batch: int, length: int) -> Iterator[None]:
    """While active, every model within `model` gets the inputs that it can do without."""
    handles = []
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            with torch.device(model.device):
                more = optional_inputs(part, batch, length)
            hand_in = partial(_hand_in, more)
            handles.append(part.register_forward_pre_hook(hand_in, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hand_in(more: dict[str, Any], _: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    given = {key: value for key, value in kwargs.items() if value is not None}
    return args, {**kwargs, **more, **given}
