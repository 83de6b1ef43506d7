"""Pre-RMSNorm and Pre-CRMSNorm in training (arXiv 2305.14858): a model that trains as it did.

    as_rmsnorm(model)       # or as_crmsnorm(model)
    ...                     # train it as before, with the same optimizer
    finish(model)           # plain weights

The parameters stay those of the original, and the forward pass sees them centered. With P for
"minus the mean over the output axis", L for the loss of the original as a function of a writing
weight W, and R for the loss of the model with RMSNorms,

    L(W) = R(P W),    so    dL/dW = P dR/d(P W)                    (P is symmetric, and P P = P)

because LayerNorm does not see the mean of its input. The left side is what the original trains,
the right side what autograd computes here: the same loss and gradient, at every W. For
CRMSNorm, P W also drops its last row, which the norm gives back. So for every optimizer the steps
are the same that it takes on the original, up to rounding: nothing has to be mapped, and weight
decay acts on the same numbers, W with its mean. (Adam blows rounding up where a gradient is
nothing else, as that of a key's bias: such numbers differ, the function does not feel them.) The
parameters are even the same objects: an optimizer may be made before or after. Only rules that go
by names or classes need care, for both change (``c_proj.weight`` is now
``c_proj.parametrizations.weight.original``, and a norm is no ``nn.LayerNorm``): sort out before
what is not to be decayed. (transformers' Trainer goes by classes: call
``trainer.create_optimizer()`` before ``as_rmsnorm(model)``.) In a state dict the names are the
original's. So what `save_pretrained` writes during training is a checkpoint of the original class,
which computes the same, and a checkpoint of that can be loaded. Resize embeddings before.

What decays in which coordinates matters only in this:

- The gradient does not depend on the mean of W. So whether W or P W decays (the mean left alone,
  or gone from the start), the function after every step is the same for SGD, with momentum too,
  and for AdamW: there decay is linear, as P is. Not where decay goes through the moments
  (Adam with L2) or a norm of W sets the step (LAMB, LARS): they need W itself.
- The weights that `finish` bakes must not be trained as they are: dR/d(P W) has a mean, the first
  step leaves the centered weights, and RMSNorm is LayerNorm no more. Training them is the same
  again only if P is applied to the gradient before the optimizer sees it and to the weight after
  the step (AdamW divides per element, which does not keep a mean zero). In the d - 1 coordinates
  of `as_crmsnorm` the metric is another one on top: for SGD the gradient must be multiplied by
  I - 11ᵀ/d first, and AdamW has no such correction.
- A LayerScale λ is trained with the W behind it as P diag(λ) W: exact for every λ, zero included,
  and both decay as they did.

Dropout on a residual stream makes a mean that no weight can take out, so it is refused; dropout
elsewhere (attention probabilities), LayerDrop and stochastic depth are not touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from normconvert.errors import PlanError, TraceError
from normconvert.ir.expression import (
    Center,
    DropLast,
    Expression,
    Fill,
    MinusLast,
    Scale,
    Tensor,
    tensors,
)
from normconvert.ir.native import Native, native_config, starred
from normconvert.model_class import auto_classes
from normconvert.nn.centering import centered
from normconvert.nn.modeling_normconvert import (
    MODEL_TYPE,
    change_modules,
    converted_config_class,
    model_class,
    set_sizes,
)
from normconvert.rules.crmsnorm import crmsnorm
from normconvert.rules.draft import Draft, Request
from normconvert.rules.origins import Origins
from normconvert.rules.rmsnorm import rmsnorm
from normconvert.trace import trace_model

if TYPE_CHECKING:
    from normconvert.ir.graph import Graph
    from normconvert.rules.draft import Rule

Model = TypeVar("Model", bound="PreTrainedModel")


def as_rmsnorm(model: Model) -> Model:
    """Make the LayerNorms of `model` RMSNorms, in place, so that it trains as before.

    Every parameter stays the same object; what writes to a residual stream is centered on its way
    into the forward pass. Exact in the sense of the module's docstring (arXiv 2305.14858).

    Raises:
        PlanError: no LayerNorm can become an RMSNorm; the model is as it was.
        TraceError: its forward pass cannot be traced; the model is as it was.
    """
    return _convert(model, (rmsnorm,))


def as_crmsnorm(model: Model) -> Model:
    """`as_rmsnorm` with residual streams of d - 1 coordinates, [..., d] → [..., d - 1].

    Every norm gives back all d coordinates, so that its gain and bias stay what is trained.

    Raises:
        PlanError: no LayerNorm can become a CRMSNorm, or the code of the model does not run on
            d - 1 coordinates; the model is as it was.
        TraceError: its forward pass cannot be traced; the model is as it was.
    """
    return _convert(model, (rmsnorm, crmsnorm))


def finish(model: Model) -> Model:
    """Bake what the forward pass of `model` sees into plain weights, in place; keep its norms.

    The function is the same; the changed weights are new parameters, which no optimizer knows.
    The weights of `as_rmsnorm` are exact in the original class too: what `save_pretrained` writes
    loads as that. Those of `as_crmsnorm` have d - 1 coordinates: a model of transformers' own
    becomes one of the native format, which `save_pretrained` writes with its code.
    """
    baked: dict[nn.Parameter, nn.Parameter] = {}
    resized: set[nn.Parameter] = set()
    seen = [(module, *each) for module in model.modules() for each in _parametrizations(module)]
    for module, name, chain in seen:  # all of them first: one may read the original of another
        original = cast("nn.Parameter", chain.original)
        if original not in baked:
            with torch.no_grad():
                value = getattr(module, name).clone()
            baked[original] = nn.Parameter(value, original.requires_grad)
            if value.shape != original.shape:
                resized.add(baked[original])
    for module, name, chain in seen:
        kind = type(module)  # a deep copy has the same one, and what is removed goes from there
        module.__class__ = type(kind.__name__, kind.__bases__, dict(kind.__dict__))
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        setattr(module, name, baked[cast("nn.Parameter", chain.original)])
    if resized and getattr(transformers, type(model).__name__, None) is type(model):
        _make_native(model, resized)
    return model


def _make_native(model: PreTrainedModel, resized: set[nn.Parameter]) -> None:
    """Make the class and the configuration of `model` those of its native checkpoint."""
    named = model.named_parameters(remove_duplicate=False)
    native = replace(
        cast("Native", model._normconvert),
        rules=("rmsnorm", "crmsnorm"),
        auto_classes=auto_classes(type(model), model.config),
        shapes=tuple((name, tuple(each.shape)) for name, each in named if each in resized),
    )
    config: Any = model.config
    config.architectures = [type(model).__name__]
    found = native_config(config.to_dict(), native)
    stock: Any = type(config)
    config.__class__ = converted_config_class(stock)
    config.auto_map, config.normconvert = found["auto_map"], found[MODEL_TYPE]
    model.__class__ = model_class(config)


def _parametrizations(module: nn.Module) -> list[tuple[str, parametrize.ParametrizationList]]:
    """Those of `module` that are ours, by the name of the parameter."""
    if not parametrize.is_parametrized(module):
        return []
    return [
        (name, chain)
        for name, chain in module.parametrizations.items()  # type: ignore[union-attr,operator]
        if isinstance(chain[0], _Seen)
    ]


def _convert(model: Model, rules: tuple[Rule, ...]) -> Model:
    if not isinstance(model, PreTrainedModel):
        raise PlanError(f"{type(model).__name__} is no model of transformers; give one of these.")
    graph = trace_model(model, training=True)
    evaluation = trace_model(model, training=False)
    full_width: frozenset[str] = frozenset()
    while True:
        draft = _draft(graph, rules, full_width)
        evaluated = _draft(evaluation, rules, full_width)
        if not draft.streams:
            raise PlanError(_why_not(graph, draft, evaluated))
        if _changes(draft) != _changes(evaluated):
            raise PlanError(
                f"{graph.model} computes its residual streams in another way in training than in "
                "evaluation, so no change is exact in both; train it with LayerNorms."
            )
        error = _failure(model, graph, draft)
        if error is None:
            return _apply(model, graph, draft)
        failed = starred(error.module)
        if crmsnorm not in rules or not failed or failed in full_width:
            instead = "as_rmsnorm" if crmsnorm in rules else "LayerNorms"
            raise PlanError(
                f"{graph.model} does not run when it is changed so ({error}) Train it with "
                f"{instead}."
            ) from error
        full_width |= {failed}


def _changes(draft: Draft) -> object:
    return draft.expressions, draft.norms, draft.recenterings, draft.full_width


def _draft(graph: Graph, rules: tuple[Rule, ...], full_width: frozenset[str]) -> Draft:
    origins = Origins(graph)
    draft = Draft(expressions={name: Tensor(name) for name, _ in graph.leaves})
    for rule in rules:
        draft = rule(graph, origins, draft, Request(format="native", full_width=full_width))
    return draft


def _why_not(graph: Graph, draft: Draft, evaluated: Draft) -> str:
    if evaluated.streams:
        return (
            f"{graph.model} has dropout on its residual streams, which no weight can center; "
            "give it as 0 when the model is made, as in from_pretrained(..., resid_pdrop=0) "
            "(attention dropout may stay)."
        )
    kept = [verdict for verdict in draft.verdicts if verdict.kind == "layernorm"]
    if not kept:
        return f"{graph.model} has no LayerNorm."
    return f"No LayerNorm of {graph.model} can be replaced in training: {kept[0].reason}."


def _failure(model: PreTrainedModel, graph: Graph, draft: Draft) -> TraceError | None:
    """Why the model does not run when it is changed, tried on fake tensors."""
    try:
        trace_model(model, lambda twin: finish(_apply(twin, graph, draft)), training=True)
    except TraceError as error:
        return error
    return None


def _apply(model: Model, graph: Graph, draft: Draft) -> Model:
    """Put the norms into `model` and parametrize what the draft has changed."""
    parameters = dict(model.named_parameters())
    holders: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(parameter, []).append((module, name))
    _replace_norms(model, graph, draft, parameters)
    for name, expression in draft.expressions.items():
        if expression == Tensor(name):
            continue
        others = {other: holders[parameters[other]][0] for other in tensors(expression) - {name}}
        for module, attribute in holders[parameters[name]]:
            seen = _Seen(name, expression, others)
            parametrize.register_parametrization(module, attribute, seen, unsafe=True)
            if attribute == "weight":
                set_sizes(module, getattr(module, attribute).shape)
    model.register_state_dict_post_hook(_name_as_before)
    model.register_load_state_dict_pre_hook(_name_as_parametrized)
    return model


def _name_as_before(model: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    """The parameters under the names that the original has: a checkpoint of the original class."""
    for name in _parametrized_names(model, prefix):
        state[name] = state.pop(_parametrized(name))


def _name_as_parametrized(model: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    for name in _parametrized_names(model, prefix):
        if name in state:
            state[_parametrized(name)] = state.pop(name)


def _parametrized_names(model: nn.Module, prefix: str) -> list[str]:
    return [
        f"{prefix}{path}.{name}" if path else f"{prefix}{name}"
        for path, module in model.named_modules(remove_duplicate=False)
        for name, _ in _parametrizations(module)
    ]


def _parametrized(name: str) -> str:
    path, dot, attribute = name.rpartition(".")
    return f"{path}{dot}parametrizations.{attribute}.original"


def _replace_norms(
    model: PreTrainedModel, graph: Graph, draft: Draft, parameters: Mapping[str, nn.Parameter]
) -> None:
    """The draft's norms, with the parameters of those that they replace, wherever these stand."""
    before = {name: model.get_submodule(name) for name in draft.norms}
    changes = Native(
        norms=tuple(draft.norms.values()),
        recenterings=draft.recenterings,
        full_width=draft.full_width,
    )
    change_modules(model, changes.to_json())
    cast("Any", model)._normconvert = changes  # for `finish`
    after: dict[nn.Module, nn.Module] = {}
    for name, module in before.items():
        norm, new = graph.norms_by_module[name], model.get_submodule(name)
        for attribute, value in (("weight", norm.gain), ("bias", norm.bias)):
            if value is not None:
                setattr(new, attribute, parameters[graph.leaf_names[value]])
        new.train(module.training)
        after[module] = new
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in after:  # the same norm under another path
                parent._modules[name] = after[child]


class _Seen(nn.Module):
    """What the forward pass sees of a parameter: an expression of it, rounded to its dtype once.

    `others` says where to find the parameters that it reads besides (a LayerScale).
    """

    def __init__(
        self, name: str, expression: Expression, others: Mapping[str, tuple[nn.Module, str]]
    ) -> None:
        super().__init__()
        self.name, self.expression = name, expression
        inner = expression.of if isinstance(expression, DropLast) else expression
        self.centers = isinstance(inner, Center) and inner.of == Tensor(name)
        self.others = dict(others)  # in a dict, so that torch does not register them here as well

    def forward(self, original: torch.Tensor) -> torch.Tensor:
        if self.centers:  # the one operation widens and rounds by itself
            return _evaluated(self.expression, {self.name: original}, original)
        dtype = torch.promote_types(original.dtype, torch.float32)
        known = {name: _original(*where) for name, where in self.others.items()}
        wide = {name: value.to(dtype) for name, value in {**known, self.name: original}.items()}
        return _evaluated(self.expression, wide, wide[self.name]).to(original.dtype)

    def extra_repr(self) -> str:
        return str(self.expression)


def _original(module: nn.Module, attribute: str) -> torch.Tensor:
    """The parameter itself, whatever the forward pass sees of it."""
    if parametrize.is_parametrized(module, attribute):
        return cast("torch.Tensor", module.parametrizations[attribute].original)  # type: ignore[union-attr,index]
    return cast("torch.Tensor", getattr(module, attribute))


def _evaluated(
    expression: Expression, known: Mapping[str, torch.Tensor], original: torch.Tensor
) -> torch.Tensor:
    """The value of `expression`, differentiable; `Fill` has the shape of `original`."""
    match expression:
        case Tensor(name):
            return known[name]
        case Fill(value):
            return torch.full_like(original, value)
        case Scale(of, axis, by):
            scaled = _evaluated(of, known, original)
            shape = [1] * scaled.ndim
            shape[axis] = -1
            return scaled * _evaluated(by, known, original).view(shape)
        case Center(of, axis):
            return centered(_evaluated(of, known, original), axis)
        case DropLast(Center(of, axis), dropped) if dropped == axis:
            return centered(_evaluated(of, known, original), axis, drop_last=True)
        case DropLast(of, axis):
            x = _evaluated(of, known, original)
            return x.narrow(axis, 0, x.shape[axis] - 1)
        case MinusLast(of, axis):
            x = _evaluated(of, known, original)
            last = x.shape[axis] - 1
            return x.narrow(axis, 0, last) - x.narrow(axis, last, 1)
    raise AssertionError(f"{expression} is of no rule that training uses")
