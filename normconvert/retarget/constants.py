"""What a model computes with besides its weights: its inputs, and the tables that it makes itself.

A trace is on fake tensors, which have no values. Here the model's tables (its rotary frequencies,
say) are real, and its parameters are not.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from normconvert.model_inputs import trace_inputs
from normconvert.quiet import quiet
from normconvert.retarget.proof import Key, needed
from normconvert.trace.forward import BATCH, LENGTH
from normconvert.trace.loading import build
from normconvert.trace.recorder import Recorder
from normconvert.trace.tracer import fake_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from normconvert.ir.graph import Graph


def skeleton(model_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """The model with all that it computes from its config, and no memory for its parameters."""
    with quiet(), init_empty_weights(include_buffers=False):
        return build(model_class, deepcopy(config), torch.float32)  # which notes its choices there


def constants(model: PreTrainedModel, graph: Graph) -> dict[int, Key]:
    """What every constant of `graph` holds, which is a trace of the `skeleton` that `model` is.

    Empty if that cannot be told. Its forward pass is deterministic: it reads the same constants
    in the same order as in the trace.
    """
    inputs = trace_inputs(model, BATCH, LENGTH)
    found = _read(model, inputs)
    live = needed(graph.nodes, [value for _, value in graph.returned])
    mine = sorted(live - graph.producers.keys() - graph.leaf_names.keys())
    if [tuple(tensor.shape) for tensor in found] != [graph.values[value].shape for value in mine]:
        return {}
    names = {id(tensor): name for name, tensor in inputs.items()}
    keys = (_key(tensor, names) for tensor in found)
    return {value: key for value, key in zip(mine, keys, strict=True) if key is not None}


def _read(model: PreTrainedModel, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """What the outputs depend on and no tensor on disk holds, in the order in which it is read.

    Nothing if the model does not run so.
    """
    recorder = _Keeping()
    on_disk = model.state_dict()
    with quiet(), fake_tensors(), torch.no_grad():
        stored = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in on_disk.items()
        }
        try:
            with recorder:
                output = functional_call(model, stored, (), inputs)
        except Exception:  # the model's own code may raise anything
            return []
        results = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        live = needed(recorder.nodes, [recorder.value(leaf) for leaf in results])
    produced = {out for node in recorder.nodes for out in node.outputs}
    loaded = {id(tensor) for tensor in stored.values()}
    read = [recorder.tensors[value] for value in sorted(live - produced)]
    return [tensor for tensor in read if id(tensor) not in loaded]


def _key(tensor: torch.Tensor, names: dict[int, str]) -> Key | None:
    if id(tensor) in names:
        return ("input", names[id(tensor)])
    if isinstance(tensor, FakeTensor) or tensor.is_complex():
        return None
    kind = "float" if tensor.is_floating_point() else str(tensor.dtype)
    return ("constant", tuple(tensor.shape), kind, tensor.double().numpy().tobytes())


class _Keeping(Recorder):  # type: ignore[no-untyped-call]
    """A recorder that gives back the tensor of every value."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def new_value(self, tensor: torch.Tensor) -> int:
        self.tensors.append(tensor)
        return super().new_value(tensor)
