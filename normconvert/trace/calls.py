"""Following the modules that run: where each is called, and which of these calls are norms."""

from __future__ import annotations

import inspect
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from normconvert.ir.graph import Call, Norm
from normconvert.trace.recognise import Formula, recognise

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from normconvert.trace.recorder import Recorder


class NormCalls:
    """While active, follows the module that runs and records each norm's call as one node."""

    def __init__(self, model: PreTrainedModel, recorder: Recorder) -> None:
        self.norms: dict[str, Norm] = {}
        self.calls: list[Call] = []
        self.run = 0
        self.passes: list[tuple[int, str]] = []
        """The first node of each further pass, and what is other in it."""
        self._first: dict[str, Formula | None] = {}
        self._recorder = recorder
        self._paths: dict[int, str] = {}
        self._model = model
        self._formula: Formula | None = None
        self._probed: dict[object, Formula | None] = {}
        self._outer: list[tuple[str, tuple[tuple[int | str, int], ...]]] = []
        self._probing = False
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> None:
        # Anew for each pass: a module may put another one in the place of a part while it runs.
        self._paths = {id(module): path for path, module in self._model.named_modules()}
        for module in self._model.modules():
            self._handles += [
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, with_kwargs=True),
            ]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._recorder.paused = False

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """The calls inside are forgotten if they end in an error."""
        norms, calls = dict(self.norms), list(self.calls)
        try:
            yield
        except BaseException:
            self.norms, self.calls, self._outer = norms, calls, []
            self._probing = False
            raise

    def not_run(self, shape: tuple[int, ...]) -> tuple[Norm, ...]:
        """The norms with a gain that nothing has read, by what they compute alone.

        On inputs of `shape`, but for the last axis.
        """
        read = {value for node in self._recorder.nodes for value in node.inputs}
        found = []
        for path, module in self._model.named_modules():
            own = [*module.parameters()]
            if path in self.norms or not own or any(each.ndim != 1 for each in own):
                continue
            if not read.isdisjoint(self._recorder.value(each) for each in own):
                continue
            of_size = (*shape, len(own[0]))
            key = (type(module), of_size, _settings(module))
            if key not in self._probed:
                self._probed[key] = recognise(module, of_size)
            formula = self._probed[key]
            if formula is not None and formula.kind != "unrecognised":
                found.append(self._norm(path, formula, *_weights(module, formula)))
        return tuple(found)

    def _norm(
        self, path: str, formula: Formula, gain: torch.Tensor | None, bias: torch.Tensor | None
    ) -> Norm:
        return Norm(
            module=path,
            kind=formula.kind,
            gain=None if gain is None else self._recorder.value(gain),
            bias=None if bias is None else self._recorder.value(bias),
            offset=formula.offset,
            eps=formula.eps,
        )

    def _before(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if self._recorder.paused:
            return
        self._outer.append(
            (self._recorder.module, self._known([*enumerate(args), *kwargs.items()]))
        )
        self._recorder.module = self._paths[id(module)]
        self._formula = self._probe(module, self._recorder.module, [*args, *kwargs.values()])
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
                run=self.run,
            )
        )

    def _known(self, arguments: list[tuple[int | str, Any]]) -> tuple[tuple[int | str, int], ...]:
        """The values of those arguments that are tensors which the graph knows."""
        known = ((key, self._recorder.known(argument)) for key, argument in arguments)
        return tuple((key, value) for key, value in known if value is not None)

    def _probe(self, module: torch.nn.Module, path: str, arguments: list[Any]) -> Formula | None:
        """The formula of this call: with a gate or a flag, it may be another one."""
        inputs = _tensors(arguments)
        given = sum(argument is not None for argument in arguments)
        if len(inputs) != 1 or given != 1 or not inputs[0].is_floating_point():
            return None
        shape = tuple(size if isinstance(size, int) else 3 for size in inputs[0].shape)
        if path in self._first and not 0 < math.prod(shape) <= _MOST_PROBED:
            return self._first[path]
        key = (type(module), shape, _settings(module))
        if key not in self._probed:
            self._probing = self._recorder.paused = True
            try:
                self._probed[key] = recognise(module, shape)
            finally:
                self._probing = self._recorder.paused = False
        self._first.setdefault(path, self._probed[key])
        return self._probed[key]

    def _add_norm(
        self, path: str, module: torch.nn.Module, x: torch.Tensor, output: torch.Tensor
    ) -> None:
        formula = self._formula
        assert formula is not None
        gain, bias = _weights(module, formula)
        norm = self._norm(path, formula, gain, bias)
        if self.norms.setdefault(path, norm) != norm:  # another call computed something else
            self.norms[path] = Norm(
                module=path, kind="unrecognised", gain=None, bias=None, offset=0.0, eps=0.0
            )
        reads = {"input": x, "gain": gain, "bias": bias}
        if formula.kind == "unrecognised":
            reads |= dict(module.named_parameters())
        self._recorder.add_call("norm", reads, output)


def _weights(
    module: torch.nn.Module, formula: Formula
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gain and the bias."""
    gain, bias = (getattr(module, name) if name else None for name in (formula.gain, formula.bias))
    return gain, bias


# Numbers; of more, as in a long text, or of none, a norm is taken for what it is in its first call.
_MOST_PROBED = 2**20


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
