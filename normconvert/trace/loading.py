"""Building a checkpoint's model on fake tensors and loading the checkpoint into it.

transformers' own loader runs, on one fake leaf for every tensor on disk, so that what it does
between disk and module (renames, stacked experts, transposes, casts) is recorded, not known.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from transformers import core_model_loading, initialization
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from normconvert.errors import TraceError
from normconvert.ir.graph import Tie
from normconvert.source import Checkpoint
from normconvert.torch_dtypes import TORCH_DTYPE
from normconvert.trace.casting import casting_anew

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

    from normconvert.trace.recorder import Recorder


def build(model_class: type[PreTrainedModel], config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model without weights, in the implementations whose operations are the plainest."""
    with initialization.no_init_weights(), initialization.no_tie_weights(), casting_anew():
        model = model_class._from_config(config, dtype=dtype, attn_implementation="eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")
    model.eval()
    return model


def load(
    model: PreTrainedModel, checkpoint: Checkpoint, recorder: Recorder
) -> tuple[tuple[tuple[str, int], ...], tuple[Tie, ...]]:
    """Load one fake leaf per tensor on disk into `model`; return the leaves and the ties.

    Raises:
        TraceError: the model needs a tensor that the checkpoint does not have, or one has
            another shape; the message names it.
    """
    dtype = model.dtype
    with _fake_empty() as empty:
        state = {
            name: _Leaf(empty(tensor.shape, _traced(tensor.dtype, dtype)))
            for name, tensor in checkpoint.tensors.items()
        }
    leaves = tuple((name, recorder.new_value(leaf.tensor)) for name, leaf in state.items())
    mapping = get_model_conversion_mapping(model)
    config = LoadStateDictConfig(weight_mapping=mapping, dtype=dtype)
    with recorder, _loading_in_this_thread(), _copying_what_is_kept():
        info, _ = convert_and_load_state_dict_in_model(model, state, config)
        _refuse_misfits(model, checkpoint, info)
        ties = _tie(model, info.missing_keys, mapping)
    tied = {tie.parameter for tie in ties}
    missing = sorted(info.missing_keys - tied - {name for name, _ in model.named_buffers()})
    if missing:
        raise TraceError(
            f"{checkpoint.folder} has no tensor for {missing[0]!r}, which "
            f"{type(model).__name__} needs ({len(missing)} missing); is the checkpoint complete?"
        )
    return leaves, ties


@dataclass(frozen=True, slots=True)
class _Leaf:
    """What transformers reads a tensor from, as from an open file. A slice would be a node."""

    tensor: torch.Tensor

    def __getitem__(self, _: object) -> _Leaf:
        return self

    def to(self, *, device: object, dtype: torch.dtype | None) -> torch.Tensor:
        """The tensor; it is where it is to be, and a fake one takes long to say so."""
        return self.tensor if dtype in (None, self.tensor.dtype) else self.tensor.to(dtype)


@contextmanager
def _fake_empty() -> Iterator[Callable[[tuple[int, ...], torch.dtype], torch.Tensor]]:
    """`torch.empty` for the fake mode that is active, at a quarter of the cost."""
    with unset_fake_temporarily() as mode:
        yield lambda shape, dtype: FakeTensor(
            mode, torch.empty(shape, dtype=dtype, device="meta"), torch.device("cpu")
        )


def _traced(stored: str, model: torch.dtype) -> torch.dtype:
    """The dtype of a leaf: as the model has it, so that it is not cast, tensor by tensor."""
    dtype = TORCH_DTYPE[stored]
    return model if dtype.is_floating_point else dtype


def _refuse_misfits(model: PreTrainedModel, checkpoint: Checkpoint, info: Any) -> None:
    for name, found, expected in info.mismatched_keys:
        raise TraceError(
            f"The tensor for {name!r} in {checkpoint.folder} has shape {list(found)}, but "
            f"{type(model).__name__} with this config.json needs {list(expected)}; do the two "
            "belong together?"
        )
    for name, error in info.conversion_errors.items():
        raise TraceError(
            f"transformers cannot load {name!r} of {checkpoint.folder}: "
            f"{error.strip().splitlines()[-1].rstrip('.')}."
        )


def _tie(model: PreTrainedModel, missing: set[str], mapping: list[Any]) -> tuple[Tie, ...]:
    """Give every tied parameter a value of its own that is an alias of the stored one.

    transformers would make them one object, and the graph could not tell who reads which.
    """
    name_on_disk = _namer(model, mapping)
    groups: dict[str, list[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, [source]).append(target)
    ties = []
    for members in groups.values():
        stored = [name for name in members if name not in missing]
        if not stored:
            continue  # reported as missing
        kept = stored[0]
        for name in members:
            if name == kept:
                continue
            if name in missing:
                _set(model, name, torch.ops.aten.alias(model.get_parameter_or_buffer(kept)))
            ties.append(
                Tie(
                    parameter=name,
                    source=kept,
                    tensor=name_on_disk(name),
                    stored=name not in missing,
                )
            )
    return tuple(ties)


def _set(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, torch.nn.Parameter(tensor, requires_grad=False))


def _namer(
    model: PreTrainedModel, mapping: list[Any], more: tuple[str, ...] = ()
) -> Callable[[str], str | None]:
    """A function from a parameter to its own name, if a tensor stored under it is loaded into it.

    `more` are parameters that the model does not have, but could.
    """
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    names = (name for name, _ in model.named_parameters(remove_duplicate=False))
    expected: dict[str, bool] = dict.fromkeys((*names, *more), True)

    def name_on_disk(parameter: str) -> str | None:
        renamed, converter = rename_source_key(
            parameter, renamings, converters, model.base_model_prefix, expected
        )
        return parameter if renamed == parameter and converter is None else None

    return name_on_disk


def open_biases(model: PreTrainedModel) -> tuple[tuple[str, str], ...]:
    """The weight of every Linear without a bias, and the name that its bias would have.

    Only where a tensor stored under that name would be loaded into it.
    """
    biases = {
        f"{path}.weight": f"{path}.bias"
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.bias is None
    }
    name_on_disk = _namer(model, get_model_conversion_mapping(model), tuple(biases.values()))
    return tuple(
        (weight, bias) for weight, bias in biases.items() if name_on_disk(bias) is not None
    )


@contextmanager
def _copying_what_is_kept() -> Iterator[None]:
    """transformers copies a converter for every tensor, and keeps the first copy of a parameter's.

    Inside, a copy that was not kept is given again: one for each of the experts would take longer
    than the rest.
    """
    spare: dict[int, WeightConverter] = {}

    def copied(original: Any) -> Any:
        if not isinstance(original, WeightConverter):
            return deepcopy(original)
        known = spare.get(id(original))
        if known is None or known.collected_tensors:  # kept: it has got a tensor
            known = spare[id(original)] = deepcopy(original)
        return known

    core_model_loading.deepcopy = copied
    try:
        yield
    finally:
        core_model_loading.deepcopy = deepcopy


@contextmanager
def _loading_in_this_thread() -> Iterator[None]:
    """transformers loads in threads, which a dispatch mode does not see."""
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before
