"""One forward pass at the model's real size on fake tensors: no memory, no weights."""

from __future__ import annotations

import math
import re
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils._pytree import keystr, tree_leaves_with_path
from transformers import Cache, PreTrainedModel

from normconvert.errors import TraceError, first_line
from normconvert.ir.graph import Graph, Tie
from normconvert.model_class import auto_classes, resolve
from normconvert.model_inputs import longest, optional_inputs, reads_ids, trace_inputs
from normconvert.model_size import of_the_size
from normconvert.quiet import quiet
from normconvert.towers import Pass, tower_passes
from normconvert.trace.caches import forgetting
from normconvert.trace.calls import NormCalls
from normconvert.trace.loading import build, load, open_biases
from normconvert.trace.naming import readable_numbers
from normconvert.trace.recorder import Recorder
from normconvert.trace.unread import widths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from normconvert.source import Checkpoint

BATCH, LENGTH = 2, 7
"""Sizes that no model dimension has, so that an axis can be told from its size."""

LONG = 4096
"""The tokens of a long text, where the config does not say how many a model reads at once."""

MOST_ASKED = 16
"""How many numbers that are not known a model's code may ask for: each costs a pass."""

FOUND = 3
"""How many elements a search finds, where the model's code must know."""


def trace(checkpoint: Checkpoint, *, trust_remote_code: bool = False, long: bool = True) -> Graph:
    """The graph of one forward pass of the model that `checkpoint` holds.

    If it reads text, a second pass is on a `long` one, and its towers for images and the like are
    run, each on its own; what cannot be run is left out, and so are its norms. If the first pass
    leaves parameters unread, it is run once more with inputs that the model, or a part of it, can
    do without.

    Raises:
        TraceError: the model is unknown, does not fit the checkpoint, or cannot be run.
    """
    with quiet():
        model_class, config = resolve(checkpoint, trust_remote_code)
    return recorded(partial(_trace, checkpoint, model_class, config, long=long))


def recorded(run: Callable[..., Graph]) -> Graph:
    """The graph of `run`, or of `run` with `optional=True` if more parameters are read there."""
    graph = _recorded(run)
    if not graph.unread_parameters:
        return graph
    try:
        wider = _recorded(partial(run, optional=True))
    except TraceError:  # it takes no such inputs after all
        return graph
    return min(graph, wider, key=lambda each: len(each.unread_parameters))


def _recorded(run: Callable[[Recorder], Graph]) -> Graph:
    """What `run` makes with a recorder; with one that makes up what a search finds, if need be."""
    try:
        return run(Recorder())
    except TraceError as error:
        if not isinstance(error.__cause__, GuardOnDataDependentSymNode):
            raise
    # A loop over what a search finds, such as the experts that are hit, needs numbers.
    try:
        return run(Recorder(found=FOUND))
    except TraceError as error:
        if isinstance(error.__cause__, IndexError):
            # One class more than there are experts is for tokens without one: it is never hit.
            return run(Recorder(found=FOUND, unused=1))
        if not isinstance(error.__cause__, GuardOnDataDependentSymNode):
            raise
    # Sizes that depend on data need decisions, from which they are computed.
    return run(Recorder(invents=True))


def _trace(
    checkpoint: Checkpoint,
    model_class: type[PreTrainedModel],
    config: Any,
    recorder: Recorder,
    *,
    long: bool,
    optional: bool = False,
) -> Graph:
    with quiet(), fake_tensors(), torch.no_grad():
        try:
            with of_the_size(checkpoint):
                model = build(model_class, config, torch.float32)
        except TraceError:
            raise
        except Exception as error:  # a model class may raise anything on values it cannot use
            raise TraceError(
                f"{checkpoint.folder / 'config.json'} does not describe a {model_class.__name__} "
                f"that can be built: {first_line(error)}."
            ) from error
        leaves, ties = load(model, checkpoint, recorder)
        return record(model, recorder, leaves, ties, with_towers=True, long=long, optional=optional)


def fake_tensors() -> FakeTensorMode:
    """The mode in which models run: sizes that depend on the data become symbols."""
    return FakeTensorMode(
        allow_non_fake_inputs=True,
        shape_env=ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True),
    )


def record(
    model: PreTrainedModel,
    recorder: Recorder,
    leaves: tuple[tuple[str, int], ...],
    ties: tuple[Tie, ...],
    *,
    with_towers: bool = False,
    long: bool = False,
    optional: bool = False,
) -> Graph:
    """The graph of one forward pass of `model`, which is on fake tensors, as `fake_tensors` makes.

    And of one of each of its towers, `with_towers`; of one on a `long` text; with `optional` inputs
    as well as needed ones.

    Raises:
        TraceError: it cannot be run.
    """
    parameters = tuple(
        (name, recorder.value(parameter))
        for name, parameter in model.named_parameters(remove_duplicate=False)
    )
    calls = NormCalls(model, recorder)
    of_towers, ran, failed = list[tuple[str, int]](), set[str](), dict[str, tuple[str, str]]()
    returned = _run(model, recorder, calls, optional=optional)
    others = _other_ways(model, recorder, calls) if recorder.invents else []
    if long and reads_ids(model):
        others += _long_run(model, recorder, calls)
    passes = tower_passes(model, BATCH, LENGTH) if with_towers else ()
    for number, each in enumerate(passes, _FIRST_OF_TOWERS):
        if each.name in ran:
            continue
        calls.run = number
        try:
            with recorder.undone_on_error(), calls.undone_on_error():
                found = _tower_run(each, recorder, calls)
        except TraceError as error:
            failed[each.name] = error.module, str(error)
            continue
        ran.add(each.name)
        if each.name:
            of_towers += [(f"{each.name}.{name}", value) for name, value in found]
        else:
            others.append(found)
    return Graph(
        model=type(model).__name__,
        auto_classes=auto_classes(type(model), model.config),
        values=tuple(recorder.values),
        nodes=tuple(recorder.nodes),
        leaves=leaves,
        parameters=parameters,
        norms=tuple(calls.norms.values()),
        ties=ties,
        outputs=tuple(returned),
        calls=tuple(calls.calls),
        open_biases=open_biases(model),
        tie_key=type(model.config).attribute_map.get(_TIE_KEY, _TIE_KEY),
        other_outputs=tuple(map(tuple, others)),
        towers=tuple(of_towers),
        widths=tuple(widths(model)),
        searched=recorder.found is not None or recorder.invents,
        not_run=calls.not_run((BATCH, LENGTH)),
        failed=tuple((name, *why) for name, why in failed.items() if name not in ran),
    )


_FIRST_OF_TOWERS = MOST_ASKED + 1


def _tower_run(each: Pass, recorder: Recorder, calls: NormCalls) -> list[tuple[str, int]]:
    options = {"output_hidden_states": True} if each.alone else {}
    return _run(each.part, recorder, calls, each.run, inputs=each.inputs, **options)


def _other_ways(
    model: PreTrainedModel, recorder: Recorder, calls: NormCalls
) -> list[list[tuple[str, int]]]:
    """A pass for each number that was invented and told, with another one: those that do run.

    Raises:
        TraceError: there are too many.
    """
    asked, found = recorder.asked, []
    if asked > MOST_ASKED:
        raise TraceError(f"{type(model).__name__} goes ways that depend on data {asked} times.")
    for recorder.turned in range(asked):
        calls.run, recorder.asked = recorder.turned + 1, 0
        with suppress(TraceError), recorder.undone_on_error(), calls.undone_on_error():
            found.append(_run(model, recorder, calls))
    calls.run, recorder.turned = 0, -1
    return found


def _long_run(
    model: PreTrainedModel, recorder: Recorder, calls: NormCalls
) -> list[list[tuple[str, int]]]:
    """One pass on as many tokens as the model reads: its code may do otherwise with them.

    Nothing if it cannot be run, or if it loops over the tokens: that would take hours.
    """
    length = (longest(model) or LONG) - 3  # an odd one, which no dimension has
    if length <= LENGTH:
        return []
    calls.run, recorder.most_nodes = -1, 2 * len(recorder.nodes)
    try:
        with recorder.undone_on_error(), calls.undone_on_error():
            return [_run(model, recorder, calls, length=length)]
    except TraceError:
        return []
    finally:
        calls.run, recorder.most_nodes = 0, math.inf


def _run(
    model: PreTrainedModel,
    recorder: Recorder,
    calls: NormCalls,
    run: Callable[..., Any] | None = None,
    *,
    inputs: dict[str, Any] | None = None,
    length: int = LENGTH,
    optional: bool = False,
    **options: Any,
) -> list[tuple[str, int]]:
    """One forward pass, or `run` on `inputs`, recorded: name and value of all that it returns."""
    try:
        if inputs is None:
            with torch.device(model.device):
                inputs = trace_inputs(model, BATCH, length)
        for name, given in inputs.items():
            if isinstance(given, torch.Tensor) and given.is_floating_point():
                inputs[name] = given.to(model.dtype)
        more = _handing_in(model) if optional else nullcontext()
        recorder.computes = recorder.invents or any(map(_is_known, inputs.values()))
        with forgetting(model), readable_numbers(), more, calls, recorder:
            output = (run or model)(**inputs, **options)
    except Exception as error:  # the model's own code may raise anything
        raise TraceError(
            f"The forward pass of {type(model).__name__} cannot be traced: {first_line(error)}.",
            module=recorder.module,
        ) from error
    found = []
    for path, leaf in tree_leaves_with_path(output):
        if isinstance(leaf, torch.Tensor):
            found.append((".".join(re.findall(r"\w+", keystr(path))), recorder.value(leaf)))
        elif not isinstance(leaf, _SEEN_THROUGH):
            raise TraceError(
                f"{type(model).__name__} returns a {type(leaf).__name__}, and what tensors that "
                "holds is not known; let it return a ModelOutput, a dict or a tuple."
            )
    return found


def _is_known(given: object) -> bool:
    """Whether it is a tensor whose numbers the model's code may look at."""
    return isinstance(given, torch.Tensor) and not isinstance(given, FakeTensor)


_SEEN_THROUGH = (bool, int, float, str, type(None), Cache)  # no tensors, or only a cache's


_TIE_KEY = "tie_word_embeddings"


@contextmanager
def _handing_in(model: PreTrainedModel) -> Iterator[None]:
    """While active, every model within `model` gets the inputs that it can do without."""
    handles = []
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            with torch.device(model.device):
                more = optional_inputs(part, BATCH, LENGTH)
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
