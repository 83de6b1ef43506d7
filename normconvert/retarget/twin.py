"""The twin of a checkpoint in another architecture: its config.json, its gains, the proof."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from normconvert.errors import NormconvertError, PlanError, TraceError, first_line
from normconvert.ir.expression import Fill
from normconvert.ir.plan import STORED_DTYPE, Edit, Plan
from normconvert.model_class import resolve
from normconvert.quiet import quiet
from normconvert.retarget.constants import constants, skeleton
from normconvert.retarget.proof import Side, difference
from normconvert.rewrite import preview
from normconvert.rules.origins import Origins
from normconvert.trace import trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from normconvert.ir.graph import Graph
    from normconvert.source import Checkpoint

_OWN = frozenset({"model_type", "architectures", "transformers_version"})


def retarget(plan: Plan, checkpoint: Checkpoint, target: str) -> tuple[Plan, Checkpoint]:
    """`plan` with an output of the model_type `target`, and the checkpoint to write it from.

    That is `checkpoint` without the config keys that the type does not know; the plan sets the
    others. The output's norms have the gains that the type needs, at their identity, and not the
    biases that it does not know, which are 0.

    Raises:
        PlanError: there is no such type, or it does not provably compute the same.
    """
    target_class = _causal_class(target)
    with TemporaryDirectory() as folder:
        before = preview(plan, checkpoint, Path(folder))
        source_class, source_config = resolve(before, trust_remote_code=False)
        graph = trace(before, further=False)
    source = Side(
        graph=graph,
        constants=constants(skeleton(source_class, source_config), graph),
        centered=frozenset(verdict.norm for verdict in plan.changed("rmsnorm")),
        ones=_filled(plan, {v.gain: 1.0 - v.offset for v in plan.verdicts}),
        zeros=_filled(plan, {v.bias: 0.0 for v in plan.verdicts}),
    )
    try:
        config = _config(before.config, source_config, target_class, _epsilon(graph))
        base = {key: value for key, value in checkpoint.config.items() if key in config}
        twin, side = _twin(
            replace(
                plan,
                config=tuple((k, v) for k, v in config.items() if k not in base or base[k] != v),
                notes=(*plan.notes, f"The output is of the class {target_class.__name__}."),
            ),
            replace(checkpoint, config=base),
            source,
        )
    except NormconvertError as error:
        why = str(error).rstrip(".")
        raise PlanError(f"{checkpoint.model} cannot become {target}: {why}.") from error
    if parting := difference(source, side):
        lost = _lost(before.config, source_config, target_class)
        hint = f" {target} has no {', '.join(lost[:3])}." if lost else ""
        raise PlanError(f"{checkpoint.model} cannot become {target}: {parting}.{hint}")
    return twin, replace(checkpoint, config=base)


def _causal_class(target: str) -> type[PreTrainedModel]:
    """The class of the causal language models of a model_type.

    Raises:
        PlanError: transformers has none.
    """
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    known = transformers.CONFIG_MAPPING
    if target not in known or known[target] not in mapping:
        near = get_close_matches(target, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, 1)
        raise PlanError(
            f"transformers {transformers.__version__} has no causal language model of the "
            f"model_type {target!r}; give another one, such as {near[0] if near else 'llama'}."
        )
    found = mapping[known[target]]
    first: type[PreTrainedModel] = found[0] if isinstance(found, (tuple, list)) else found
    return first


def _config(
    stored: Mapping[str, Any], source: Any, target_class: type[PreTrainedModel], eps: float
) -> dict[str, Any]:
    """config.json of the target: what both types know is equal, the norm epsilon is `eps`.

    Keys that neither of them knows stay as they are.
    """
    config_class: Any = target_class.config_class
    known, own = _keys(config_class), _keys(type(source))
    config = {key: value for key, value in stored.items() if key in known or key not in own}
    config |= {"model_type": config_class.model_type, "architectures": [target_class.__name__]}
    target = _made(config_class, config)
    values = source.to_dict()
    for key in sorted(known - _OWN):
        if hasattr(source, key):
            value = getattr(source, key)
            if value != getattr(target, key):
                config[key] = values.get(key, value)
        elif "eps" in key and isinstance(getattr(target, key), float):
            config[key] = eps
    _made(config_class, config)
    return config


def _made(config_class: Any, config: Mapping[str, Any]) -> Any:
    """The config object.

    Raises:
        PlanError: the class does not take these values.
    """
    try:
        with quiet():
            return config_class.from_dict(dict(config))
    except Exception as error:  # a config class may raise anything on values it cannot use
        raise PlanError(
            f"its config is none of {config_class.__name__}: {first_line(error)}"
        ) from error


def _keys(config_class: Any) -> set[str]:
    return {*(field.name for field in fields(config_class)), *config_class.attribute_map}


def _lost(stored: Mapping[str, Any], source: Any, target_class: type[PreTrainedModel]) -> list[str]:
    """The settings of the source that the target does not have, where they are not the default."""
    defaults = {field.name: field.default for field in fields(source)}
    known = _keys(target_class.config_class)
    own = {key: stored[key] for key in stored if key in defaults and key not in known}
    return [
        f"{key} ({value!r})"
        for key, value in own.items()
        if value != defaults[key] and not isinstance(value, (dict, list))
    ]


def _epsilon(graph: Graph) -> float:
    """The epsilon of most norms."""
    return Counter(norm.eps for norm in graph.norms).most_common(1)[0][0]


def _filled(plan: Plan, values: Mapping[str | None, float]) -> frozenset[str]:
    """Those tensors among `values` that `plan` fills with the number given there."""
    return frozenset(
        edit.tensor
        for edit in plan.edits
        if isinstance(edit.expression, Fill) and edit.expression.value == values.get(edit.tensor)
    )


def _twin(plan: Plan, base: Checkpoint, source: Side) -> tuple[Plan, Side]:
    """`plan` with the tensors of the target, which its config names, and what that computes.

    Raises:
        NormconvertError: the target needs tensors that are no gains of norms, or others.
    """
    with TemporaryDirectory() as folder:
        planned = preview(plan, base, Path(folder))
        model = _skeleton(planned)
        missing = _missing(model, planned)
        dtype = _main_dtype(planned)
        edits = (
            *plan.edits,
            *(
                Edit(tensor=name, dtype=dtype, shape=shape, expression=Fill(1.0))
                for name, shape in missing.items()
                if len(shape) == 1
            ),
        )
        graph = _traced(replace(plan, edits=edits), base, Path(folder), missing)
    origins = Origins(graph)
    found = {(origins.vector(norm.gain), norm.offset) for norm in graph.norms}
    offsets = {gain: offset for gain, offset in found if gain is not None}
    if stray := sorted(missing.keys() - offsets.keys()):
        raise PlanError(f"it has no tensor {stray[0]!r}")
    ones = frozenset((source.ones | missing.keys()) & offsets.keys())
    if len([gain for gain, _ in found if gain in ones]) > len(ones):
        raise PlanError("norms of different kinds share a gain")
    omitted = {*plan.omitted, *graph.unread} - {*source.graph.unread}
    twin = replace(
        plan,
        edits=tuple(
            replace(edit, expression=Fill(1.0 - offsets[edit.tensor]))
            if edit.tensor in ones
            else edit
            for edit in edits
            if edit.tensor not in omitted
        ),
        omitted=tuple(name for name in base.tensors if name in omitted),
    )
    return twin, Side(graph=graph, constants=constants(model, graph), ones=ones, zeros=source.zeros)


def _skeleton(planned: Checkpoint) -> PreTrainedModel:
    model_class, config = resolve(planned, trust_remote_code=False)
    try:
        return skeleton(model_class, config)
    except Exception as error:  # a model class may raise anything on values it cannot use
        raise PlanError(
            f"{model_class.__name__} cannot be built with its config: {first_line(error)}"
        ) from error


def _missing(model: PreTrainedModel, planned: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The parameters of the model that no tensor of the checkpoint has the name of."""
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name not in planned.tensors and name not in model.all_tied_weights_keys
    }


def _main_dtype(planned: Checkpoint) -> str:
    """The floating dtype that most tensors are stored in."""
    dtypes = (tensor.dtype for tensor in planned.tensors.values())
    return Counter(d for d in dtypes if d in STORED_DTYPE.values()).most_common(1)[0][0]


def _traced(
    twin: Plan, base: Checkpoint, folder: Path, missing: Mapping[str, tuple[int, ...]]
) -> Graph:
    try:
        return trace(preview(twin, base, folder), further=False)
    except TraceError as error:
        if matrices := [name for name, shape in missing.items() if len(shape) != 1]:
            raise PlanError(f"it has no tensor {matrices[0]!r}") from error
        raise PlanError(str(error).replace(f" in {folder}", "").partition(";")[0]) from error
