"""One forward pass at the model's real size on fake tensors: no memory, no weights."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

from normconvert.errors import TraceError, first_line
from normconvert.images import accepted
from normconvert.ir.graph import Graph, Tie
from normconvert.model_class import auto_classes, resolve
from normconvert.model_inputs import reads_ids
from normconvert.model_size import of_the_size
from normconvert.quiet import quiet
from normconvert.towers import images_beside
from normconvert.trace.calls import NormCalls
from normconvert.trace.forward import BATCH, LENGTH, plain_pass
from normconvert.trace.further import FurtherPasses
from normconvert.trace.loading import build, load, open_biases
from normconvert.trace.recorder import Recorder
from normconvert.trace.unread import widths

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from normconvert.source import Checkpoint

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
    returned, images = _first_pass(model, recorder, calls, optional=optional)
    count, asked = len(recorder.nodes), recorder.asked
    others = FurtherPasses(model, recorder, calls, images=images)
    if recorder.invents:
        others.on_other_data(asked)
    if further and reads_ids(model):
        others.on_a_long_text(most_nodes=count)
    if further:
        others.in_use(returned, optional=optional)
    if with_towers:
        others.of_images_and_sound()
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
        other_outputs=tuple(map(tuple, others.of_the_whole)),
        passes=tuple(calls.passes),
        towers=tuple(each for found in others.of_towers.values() for each in found),
        apart=tuple(
            each
            for tower, found in others.of_towers.items()
            if tower not in others.followed
            for each in found
        ),
        widths=tuple(widths(model)),
        searched=recorder.found is not None or recorder.invents,
        not_run=calls.not_run((BATCH, LENGTH)),
        failed=tuple(others.failed),
    )


def _first_pass(
    model: PreTrainedModel, recorder: Recorder, calls: NormCalls, *, optional: bool
) -> tuple[list[tuple[str, int]], bool]:
    """What one plain pass returns, and whether it needs images beside the text.

    Raises:
        TraceError: it cannot be run with them either.
    """
    run = partial(plain_pass, model, recorder, calls, optional=optional)
    try:
        with recorder.undone_on_error(), calls.undone_on_error():
            return run(), False
    except TraceError as error:
        if "pixel_values" not in accepted(model.forward):
            raise
        try:
            with recorder.undone_on_error(), calls.undone_on_error():
                return run(**images_beside(model, BATCH)), True
        except TraceError as other:
            alone, beside = (_cause(each) for each in (error, other))
            raise TraceError(
                f"{type(model).__name__} runs neither on text alone ({alone}) nor with images "
                f"beside it ({beside}).",
                module=error.module,
            ) from error.__cause__


def _cause(error: TraceError) -> str:
    cause = error.__cause__
    return first_line(cause) if isinstance(cause, Exception) else str(error).rstrip(".")


_TIE_KEY = "tie_word_embeddings"
