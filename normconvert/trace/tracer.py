"""One forward pass at the model's real size on fake tensors: no memory, no weights."""

from __future__ import annotations

import inspect
import re
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils._pytree import keystr, tree_leaves, tree_leaves_with_path
from transformers import Cache, PreTrainedModel

from normconvert.errors import TraceError, first_line
from normconvert.ir.graph import Call, Graph, Norm, Tie
from normconvert.model_class import auto_classes, resolve
from normconvert.model_inputs import optional_inputs, towers, trace_inputs
from normconvert.model_size import of_the_size
from normconvert.quiet import quiet
from normconvert.trace.caches import forgetting
from normconvert.trace.loading import build, load, open_biases
from normconvert.trace.naming import readable_numbers
from normconvert.trace.recognise import Formula, recognise
from normconvert.trace.recorder import Recorder
from normconvert.trace.unread import for_images, widths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from normconvert.source import Checkpoint

BATCH, LENGTH = 2, 7
"""Sizes that no model dimension has, so that an axis can be told from its size."""

FOUND = 3
"""How many elements a search finds, where the model's code must know."""


def trace(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Graph:
    """The graph of one forward pass of the model that `checkpoint` holds.

    If it reads text, its towers for images and the like are run as well, each on its own; one that
    cannot be is left out, with all others, and so are their norms. If the pass leaves parameters
    unread, it is run once more with inputs that the model, or a part of it, can do without.

    Raises:
        TraceError: the model is unknown, does not fit the checkpoint, or cannot be run.
    """
    with quiet():
        model_class, config = resolve(checkpoint, trust_remote_code)
    run = partial(_trace, checkpoint, model_class, config)
    try:
        return recorded(run)
    except _TowerError:
        return recorded(partial(run, with_towers=False))


class _TowerError(TraceError):
    """A tower cannot be run on its own."""


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
        if not isinstance(error.__cause__, IndexError):
            raise
    # One class more than there are experts is for tokens without one: it is never hit.
    return run(Recorder(found=FOUND, unused=1))


def _trace(
    checkpoint: Checkpoint,
    model_class: type[PreTrainedModel],
    config: Any,
    recorder: Recorder,
    *,
    with_towers: bool = True,
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
        return record(model, recorder, leaves, ties, with_towers=with_towers, optional=optional)


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
    optional: bool = False,
) -> Graph:
    """The graph of one forward pass of `model`, which is on fake tensors, as `fake_tensors` makes.

    And of one of each of its towers, `with_towers`; with `optional` inputs as well as needed ones.

    Raises:
        TraceError: it cannot be run.
    """
    parameters = tuple(
        (name, recorder.value(parameter))
        for name, parameter in model.named_parameters(remove_duplicate=False)
    )
    calls = _NormCalls(model, recorder)
    returned, of_towers = _run(model, recorder, calls, optional=optional), []
    for path, tower in towers(model).items() if with_towers else ():
        try:
            of_tower = _run(tower, recorder, calls, output_hidden_states=True)
        except TraceError as error:
            raise _TowerError(str(error), module=error.module) from error.__cause__
        of_towers += [(f"{path}.{name}", value) for name, value in of_tower]
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
        towers=tuple(of_towers),
        widths=tuple(widths(model)),
        for_images=for_images(model, BATCH, LENGTH) if with_towers else (),
        searched=recorder.found is not None,
    )


def _run(
    model: PreTrainedModel,
    recorder: Recorder,
    calls: _NormCalls,
    *,
    optional: bool = False,
    **options: Any,
) -> list[tuple[str, int]]:
    """One forward pass, recorded: the name and the value of all that it returns."""
    try:
        with torch.device(model.device):
            inputs = trace_inputs(model, BATCH, LENGTH)
        for name, given in inputs.items():
            if isinstance(given, torch.Tensor) and given.is_floating_point():
                inputs[name] = given.to(model.dtype)
        more = _handing_in(model) if optional else nullcontext()
        with forgetting(model), readable_numbers(), more, calls, recorder:
            output = model(**inputs, **options)
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


class _NormCalls:
    """While active, follows the module that runs and records each norm's call as one node."""

    def __init__(self, model: PreTrainedModel, recorder: Recorder) -> None:
        self.norms: dict[str, Norm] = {}
        self.calls: list[Call] = []
        self._recorder = recorder
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._model = model
        self._formula: Formula | None = None
        self._probed: dict[object, Formula | None] = {}
        self._outer: list[tuple[str, tuple[tuple[int | str, int], ...]]] = []
        self._probing = False
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> None:
        for module in self._model.modules():
            self._handles += [
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, with_kwargs=True),
            ]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._recorder.paused = False

    def _before(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if self._recorder.paused:
            return
        self._outer.append(
            (self._recorder.module, self._known([*enumerate(args), *kwargs.items()]))
        )
        self._recorder.module = self._paths[id(module)]
        self._formula = self._probe(module, [*args, *kwargs.values()])
        self._recorder.paused = self._formula is not None

    def _after(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        path = self._paths[id(module)]
        if self._recorder.paused:
            if self._probing or path != self._recorder.module:
                return
            self._recorder.paused = False
            self._add_norm(path, module, _tensors([*args, *kwargs.values()])[0], output)
        self._recorder.module, inputs = self._outer.pop()
        known = self._known([(0, output)])
        outputs = self._known([*enumerate(tree_leaves(output))])
        self.calls.append(
            Call(
                module=path,
                inputs=inputs,
                unused=_unused(module, args, kwargs),
                outputs=tuple(value for _, value in outputs),
                output=known[0][1] if known else None,
            )
        )

    def _known(self, arguments: list[tuple[int | str, Any]]) -> tuple[tuple[int | str, int], ...]:
        """The values of those arguments that are tensors which the graph knows."""
        known = ((key, self._recorder.known(argument)) for key, argument in arguments)
        return tuple((key, value) for key, value in known if value is not None)

    def _probe(self, module: torch.nn.Module, arguments: list[Any]) -> Formula | None:
        """The formula of this call: with a gate or a flag, it may be another one."""
        inputs = _tensors(arguments)
        given = sum(argument is not None for argument in arguments)
        if len(inputs) != 1 or given != 1 or not inputs[0].is_floating_point():
            return None
        shape = tuple(size if isinstance(size, int) else 3 for size in inputs[0].shape)
        key = (type(module), shape, _settings(module))
        if key not in self._probed:
            self._probing = self._recorder.paused = True
            try:
                self._probed[key] = recognise(module, shape)
            finally:
                self._probing = self._recorder.paused = False
        return self._probed[key]

    def _add_norm(
        self, path: str, module: torch.nn.Module, x: torch.Tensor, output: torch.Tensor
    ) -> None:
        formula = self._formula
        assert formula is not None
        gain = getattr(module, formula.gain) if formula.gain else None
        bias = getattr(module, formula.bias) if formula.bias else None
        norm = Norm(
            module=path,
            kind=formula.kind,
            gain=None if gain is None else self._recorder.value(gain),
            bias=None if bias is None else self._recorder.value(bias),
            offset=formula.offset,
            eps=formula.eps,
        )
        if self.norms.setdefault(path, norm) != norm:  # another call computed something else
            self.norms[path] = Norm(
                module=path, kind="unrecognised", gain=None, bias=None, offset=0.0, eps=0.0
            )
        reads = {"input": x, "gain": gain, "bias": bias}
        if formula.kind == "unrecognised":
            reads |= dict(module.named_parameters())
        self._recorder.add_call("norm", reads, output)


def _unused(module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[str, ...]:
    """The inputs that the module takes and was not given."""
    signature = inspect.signature(module.forward)
    given = signature.bind_partial(*args, **kwargs).arguments
    various = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = (name for name, each in signature.parameters.items() if each.kind not in various)
    return tuple(name for name in names if given.get(name) is None)


def _tensors(arguments: list[Any]) -> list[torch.Tensor]:
    return [value for value in arguments if isinstance(value, torch.Tensor)]


def _settings(module: torch.nn.Module) -> object:
    """All that two modules of a class can differ in, apart from values: or the module itself."""
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    hooked = len(module._forward_hooks) + len(module._forward_pre_hooks) > 2  # the tracer's
    if hooked or any(
        not isinstance(value, (int, float, str, tuple, type(None))) for value in own.values()
    ):
        return module
    tensors = (*module.named_parameters(), *module.named_buffers())
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in tensors)
    return (repr(sorted(own.items())), shapes, next(module.children(), None))


_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module()))
