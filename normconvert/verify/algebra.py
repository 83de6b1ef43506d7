"""The algebra, site by site: what reads a rewritten norm computes the same as before.

Both models run in float64 on the same input, the converted one with the plan's expressions as
they are before rounding. So a wrong rewrite shows at the norm that it belongs to, and rounding
does not show at all.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from normconvert.errors import VerificationError, first_line
from normconvert.ir.report import Algebra, Site
from normconvert.precision import float64
from normconvert.quiet import quiet
from normconvert.torch_dtypes import TORCH_DTYPE
from normconvert.verify.loading import load_model
from normconvert.verify.placement import free_memory
from normconvert.verify.recompute import STORED_BITS, Recomputer
from normconvert.verify.stored import Stored, decode
from normconvert.verify.tokens import input_sets

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from normconvert.ir.plan import Plan
    from normconvert.source import Checkpoint

TOLERANCE = 1e-12
_POSITIONS = 16


def check_sites(
    plan: Plan,
    original: Checkpoint,
    converted: Checkpoint,
    modules: Mapping[str, tuple[str, ...]],
    trust_remote_code: bool,
) -> Algebra:
    """Every norm that `plan` changes, with what reads it.

    `modules` tells in which modules of the model each tensor of the checkpoint is.

    Raises:
        VerificationError: the models cannot be run in float64, or do not fit in memory.
    """
    _require_memory(original)
    sites = _sites(plan, modules)
    watched = {module for readers in sites.values() for module in readers}
    with quiet(), Stored(original) as stored:
        before = load_model(original, torch.float64, trust_remote_code)
        inputs = _inputs(before, original, trust_remote_code)
        expected = _outputs(before, watched, inputs)
        del before
        tensors = dict(_unrounded(plan, stored))
        after = load_model(converted, torch.float64, trust_remote_code, tensors)
        found = _outputs(after, watched, inputs)
    centered = "rmsnorm" in plan.rules
    errors = {
        module: _difference(expected[module], found[module], centered)
        for module in expected.keys() & found.keys()
    }
    return Algebra(
        sites=tuple(
            Site(norm=norm, readers=readers, error=max(errors[each] for each in readers))
            for norm, all_readers in sites.items()
            if (readers := tuple(each for each in all_readers if each in errors))
        ),
        tolerance=TOLERANCE,
    )


def _require_memory(original: Checkpoint) -> None:
    needed = 8 * sum(math.prod(tensor.shape) for tensor in original.tensors.values())
    available = free_memory()
    if 2 * needed > available:  # the tensors, and the model that is loaded of them
        raise VerificationError(
            f"The algebra was not checked: in float64 it takes {2 * needed / 1e9:.1f} GB of "
            f"memory, and {available / 1e9:.1f} GB are available."
        )


def _sites(plan: Plan, modules: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The modules that read each norm which some rule changes; itself where none is known."""
    changed = {verdict.norm for rule in plan.rules for verdict in plan.changed(rule)}
    readers: dict[str, dict[str, None]] = {}
    for verdict in plan.verdicts:
        if verdict.norm in changed:
            found = readers.setdefault(verdict.norm, {})
            for tensor in verdict.readers:
                found.update(dict.fromkeys(modules[tensor]))
    return {norm: tuple(each) or (norm,) for norm, each in readers.items()}


def _inputs(model: Any, checkpoint: Checkpoint, trust_remote_code: bool) -> dict[str, Any]:
    """One short random input."""
    sets, _ = input_sets(model, checkpoint, None, trust_remote_code)
    short: dict[str, Any] = tree_map(_short, list(sets.values())[-1])
    return short


def _short(given: Any) -> Any:
    """The first few tokens of the first sequence; of anything else the first."""
    if not isinstance(given, torch.Tensor):
        return given
    return given[:1, :_POSITIONS] if given.dtype is torch.int64 else given[:1]


def _outputs(model: Any, watched: set[str], inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What each watched module returns, all its calls one behind the other."""
    found: dict[str, list[torch.Tensor]] = {}

    def keep(path: str, module: torch.nn.Module, arguments: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, torch.Tensor):
            found.setdefault(path, []).append(first.flatten(0, -2))

    for path in watched:
        model.get_submodule(path).register_forward_hook(partial(keep, path))
    try:
        with torch.no_grad(), float64():
            model(**inputs)
    except Exception as error:  # the model's own code may raise anything
        raise VerificationError(
            f"The algebra was not checked: {type(model).__name__} cannot be run in float64 "
            f"({first_line(error)})."
        ) from error
    return {path: torch.cat(calls) for path, calls in found.items()}


def _unrounded(plan: Plan, stored: Stored) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the output, in float64 if it is floating point."""
    recompute = Recomputer(stored)
    edits = {edit.tensor: edit for edit in plan.edits}
    for name, tensor in stored.tensors.items():
        if name not in edits and name not in plan.omitted:
            if tensor.dtype in STORED_BITS:
                whole = tuple(slice(0, size) for size in tensor.shape)
                yield name, torch.from_numpy(decode(stored.box(name, whole), tensor.dtype))
            else:
                raw = torch.frombuffer(stored.bytes(name, 0, tensor.nbytes), dtype=torch.uint8)
                yield name, raw.view(TORCH_DTYPE[tensor.dtype]).reshape(tensor.shape)
    for name, edit in edits.items():
        whole = tuple(slice(0, size) for size in edit.shape)
        yield name, torch.from_numpy(recompute.box(edit.expression, edit.shape, whole).value)


def _difference(before: torch.Tensor, after: torch.Tensor, centered: bool) -> float:
    """The largest one, relative to the largest element; without the mean, if that may go.

    A module that writes to the stream loses its mean, and in a compressed model the last
    coordinate as well.
    """
    size = float(before.abs().max()) or 1.0
    found = math.inf if before.shape != after.shape else float((before - after).abs().max())
    if centered:
        free = before - before.mean(-1, keepdim=True)
        if before.shape[-1] == after.shape[-1] + 1:
            free = free[..., :-1]
        if free.shape == after.shape:
            found = min(found, float((free - after).abs().max()))
    return found / size
