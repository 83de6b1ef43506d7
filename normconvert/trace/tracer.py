"""One forward pass at the model's real size on fake tensors: no memory, no weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from transformers import PreTrainedModel

from normconvert.errors import TraceError, first_line
from normconvert.ir.graph import Graph, Tie
from normconvert.model_class import auto_classes, resolve
from normconvert.model_inputs import (
    all_wanted,
    handed_back,
    inputs_in_use,
    longest,
    reads_ids,
)
from normconvert.model_size import of_the_size
from normconvert.quiet import quiet
from normconvert.towers import tower_passes
from normconvert.trace.calls import NormCalls
from normconvert.trace.forward import (
    BATCH,
    LENGTH,
    as_trace_errors,
    output_of,
    plain_pass,
    values_of,
)
from normconvert.trace.loading import build, load, open_biases
from normconvert.trace.recorder import Recorder
from normconvert.trace.unread import widths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from normconvert.source import Checkpoint

LONG = 4096
"""The tokens of a long text, where the config does not say how many a model reads at once."""

MOST_ASKED = 16
"""How many numbers that are not known a model's code may ask for: each costs a pass."""

FOUND = 3
"""How many elements a search finds, where the model's code must know."""


def trace(
    checkpoint: Checkpoint, *, trust_remote_code: bool = False, further: bool = True
) -> Graph:
    """The graph of one forward pass of the model that `checkpoint` holds.

    Its towers for images and the like are run, each on its own; of a norm that is in no pass, the
    graph only says what it computes. If the first pass leaves parameters unread, it is run once
    more with inputs that the model, or a part of it, can do without. If there are to be `further`
    passes, one is on a long text, and others are as in use: on a single text, with a mask, a cache
    and labels.

    Raises:
        TraceError: the model is unknown, does not fit the checkpoint, or cannot be run.
    """
    with quiet():
        model_class, config = resolve(checkpoint, trust_remote_code)
    return recorded(partial(_trace, checkpoint, model_class, config, further=further))


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
    further: bool,
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
        return record(
            model, recorder, leaves, ties, with_towers=True, further=further, optional=optional
        )


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
    further: bool = False,
    optional: bool = False,
) -> Graph:
    """The graph of one forward pass of `model`, which is on fake tensors, as `fake_tensors` makes.

    And of one of each of its towers, `with_towers`; of `further` ones, see `trace`; with `optional`
    inputs as well as needed ones.

    Raises:
        TraceError: it cannot be run.
    """
    parameters = tuple(
        (name, recorder.value(parameter))
        for name, parameter in model.named_parameters(remove_duplicate=False)
    )
    calls = NormCalls(model, recorder)
    returned = plain_pass(model, recorder, calls, optional=optional)
    count, asked = len(recorder.nodes), recorder.asked
    others = _other_ways(model, recorder, calls, asked) if recorder.invents else []
    if further and reads_ids(model):
        others += _long_run(model, recorder, calls, most_nodes=count)
    if further:
        others += _in_use(model, recorder, calls, returned, optional=optional)
    of_towers, beside, failed = _run_towers(model, recorder, calls) if with_towers else ([], [], [])
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
        other_outputs=tuple(map(tuple, others + beside)),
        passes=tuple(calls.passes),
        towers=tuple(of_towers),
        widths=tuple(widths(model)),
        searched=recorder.found is not None or recorder.invents,
        not_run=calls.not_run((BATCH, LENGTH)),
        failed=tuple(failed),
    )


def _run_towers(
    model: PreTrainedModel, recorder: Recorder, calls: NormCalls
) -> tuple[list[tuple[str, int]], list[list[tuple[str, int]]], list[tuple[str, str, str]]]:
    """What towers return, what the whole model returns beside images, and what cannot be run."""
    of_towers, of_the_whole = list[tuple[str, int]](), list[list[tuple[str, int]]]()
    ran, failed = set[str](), dict[str, tuple[str, str]]()
    for each in tower_passes(model, BATCH, LENGTH):
        if each.name in ran:
            continue
        options = {"output_hidden_states": True} if each.alone else {}
        what = "" if each.name else "beside images"
        try:
            with _further(recorder, calls, what), as_trace_errors(each.part, recorder):
                output = output_of(each.part, recorder, calls, each.inputs | options, run=each.run)
                found = values_of(each.part, recorder, output)
        except TraceError as error:
            failed[each.name] = error.module, str(error)
            continue
        ran.add(each.name)
        if each.name:
            of_towers += [(f"{each.name}.{name}", value) for name, value in found]
        else:
            of_the_whole.append(found)
    return (
        of_towers,
        of_the_whole,
        [(name, *why) for name, why in failed.items() if name not in ran],
    )


def _other_ways(
    model: PreTrainedModel, recorder: Recorder, calls: NormCalls, asked: int
) -> list[list[tuple[str, int]]]:
    """A pass for each number that was invented and `asked` for, with another: those that do run.

    Raises:
        TraceError: there are too many.
    """
    found = []
    if asked > MOST_ASKED:
        raise TraceError(f"{type(model).__name__} goes ways that depend on data {asked} times.")
    for recorder.turned in range(asked):
        recorder.asked = 0
        with suppress(TraceError), _further(recorder, calls, "on other data"):
            found.append(plain_pass(model, recorder, calls))
    recorder.turned = -1
    return found


@contextmanager
def _further(recorder: Recorder, calls: NormCalls, what: str) -> Iterator[None]:
    """A further pass of the model, in which `what` is other: forgotten if it ends in an error."""
    first, calls.run = len(recorder.nodes), len(calls.passes) + 1
    try:
        with recorder.undone_on_error(), calls.undone_on_error():
            yield
        calls.passes.append((first, what))
    finally:
        calls.run = 0


def _long_run(
    model: PreTrainedModel, recorder: Recorder, calls: NormCalls, *, most_nodes: int
) -> list[list[tuple[str, int]]]:
    """One pass on as many tokens as the model reads: its code may do otherwise with them.

    Nothing if it cannot be run, or takes more than `most_nodes`: then it loops over the tokens,
    which would take hours.
    """
    length = (longest(model) or LONG) - 3  # an odd one, which no dimension has
    if length <= LENGTH:
        return []
    recorder.most_nodes = len(recorder.nodes) + most_nodes
    try:
        with _further(recorder, calls, "on a long text"):
            return [plain_pass(model, recorder, calls, length=length)]
    except TraceError:
        return []
    finally:
        recorder.most_nodes = math.inf


def _in_use(
    model: PreTrainedModel,
    recorder: Recorder,
    calls: NormCalls,
    first: list[tuple[str, int]],
    *,
    optional: bool,
) -> list[list[tuple[str, int]]]:
    """Two passes on a single text as in use: all of it with a mask, then one token with the cache.

    The first with gradients, labels and all that the model can return besides; if it does not run
    so, or makes no cache, without labels, without these, and without a cache. What cannot be run is
    left out.
    """
    fields = {"loss", *(name.partition(".")[0] for name, _ in first)}
    logits = next((recorder.values[value].shape for name, value in first if name == "logits"), ())
    found: list[list[tuple[str, int]]] = []

    def run(what: str, inputs: dict[str, Any]) -> Any:
        with _further(recorder, calls, what), as_trace_errors(model, recorder):
            output = output_of(model, recorder, calls, inputs, (1, LENGTH) if optional else None)
            if _asks(inputs) and not isinstance(output, Mapping):
                raise TraceError("Among outputs without names, more of them move the others.")
            values = values_of(model, recorder, output, fields)
            found.append(values or values_of(model, recorder, output))
        return output

    with torch.device(model.device):
        plain = inputs_in_use(model, LENGTH)
        full = plain | all_wanted(model, logits)
    # Labels may have to be of another kind.
    unlabelled = {name: given for name, given in full.items() if name != "labels"}
    output, cache = None, dict[str, Any]()
    for inputs in (full, unlabelled, plain, {**plain, "use_cache": False}):
        if inputs is unlabelled and (found or "labels" not in full):
            continue
        with suppress(TraceError), _gradients(model) if _asks(inputs) else nullcontext():
            output = run(_circumstances(inputs), inputs)
            cache = handed_back(model, output)
        if cache or (found and (inputs is plain or "use_cache" not in plain)):
            break
    if cache:
        with suppress(TraceError):
            states = getattr(output, "encoder_last_hidden_state", None)
            with torch.device(model.device):
                inputs = inputs_in_use(model, LENGTH, cache, states)
            run("on one token with a cache", inputs)
    return found


def _asks(inputs: dict[str, Any]) -> bool:
    """Whether more is to be returned than in the first pass."""
    return "labels" in inputs or "output_attentions" in inputs


def _circumstances(inputs: dict[str, Any]) -> str:
    """What is other with these `inputs` than in the first pass."""
    given = [word for name, word in _OTHER.items() if inputs.get(name, False) is not False]
    return " with ".join(["on a batch of one", *filter(None, [", ".join(given)])])


_OTHER = {
    "attention_mask": "a mask",
    "use_cache": "a cache",
    "labels": "labels",
    "output_attentions": "all outputs",
}


@contextmanager
def _gradients(model: PreTrainedModel) -> Iterator[None]:
    """While active, gradients are enabled, as code may ask, but nothing needs any: that is slow."""
    learning = [each for each in model.parameters() if each.requires_grad]
    model.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


_TIE_KEY = "tie_word_embeddings"
