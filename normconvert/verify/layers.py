"""Where two models part: what each of their layers returns, at some of the positions."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_EVERY = 8
"""Of how many positions one is kept: 80 layers of a large model must not fill the memory."""


@contextmanager
def layer_states(model: Any) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Inside, what every layer of `model` returns at each run, by the path of its module.

    Layers are the members of the outermost lists of modules.
    """
    states: dict[str, list[torch.Tensor]] = {}

    def watch(path: str, module: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
        def keep(_: torch.nn.Module, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor) and first.is_floating_point() and first.ndim > 1:
                kept = first.flatten(0, -2)[::_EVERY].to("cpu", copy=True)
                states.setdefault(path, []).append(kept)

        return module.register_forward_hook(keep)

    with ExitStack() as handles:
        for path, module in _layers(model):
            handles.callback(watch(path, module).remove)
        yield states


def distances(
    one: Mapping[str, list[torch.Tensor]], other: Mapping[str, list[torch.Tensor]], centered: bool
) -> dict[str, float]:
    """The RMS difference of each layer that both models have; `centered`: but for the mean."""
    found = {}
    for path in one:
        pairs = list(zip(one[path], other.get(path, ()), strict=False))
        if pairs and all(len(a) == len(b) for a, b in pairs):
            parts = [_difference(a, b, centered).flatten() for a, b in pairs]
            found[path] = float(torch.cat(parts).square().mean().sqrt())
    return found


def _layers(model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    lists = [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) > 1
    ]
    for path in lists:
        if not any(path.startswith(f"{outer}.") for outer in lists):
            for name, layer in model.get_submodule(path).named_children():
                yield f"{path}.{name}", layer


def _difference(a: torch.Tensor, b: torch.Tensor, centered: bool) -> torch.Tensor:
    """In float64. The last coordinate of a compressed state is minus the sum of the others."""
    a, b = a.to(torch.float64), b.to(torch.float64)
    size = max(a.shape[-1], b.shape[-1])
    a, b = (_whole(each, size) for each in (a, b))
    if a.shape != b.shape:
        return torch.full((1,), torch.inf, dtype=torch.float64)
    if centered:
        a, b = (each - each.mean(-1, keepdim=True) for each in (a, b))
    return a - b


def _whole(state: torch.Tensor, size: int) -> torch.Tensor:
    if state.shape[-1] != size - 1:
        return state
    return torch.cat([state, -state.sum(-1, keepdim=True)], dim=-1)
