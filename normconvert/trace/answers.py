"""The fake mode's answers, remembered: layers are alike, and ask the same again and again.

The fake mode remembers them too, but takes most of its time to find out what it is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

if TYPE_CHECKING:
    from collections.abc import Hashable


@dataclass(frozen=True, slots=True)
class _Layout:
    """A tensor of an answer; `shares`: it is on the memory of the only tensor asked about."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    shares: bool


_Answer: TypeAlias = "_Layout | tuple[type, tuple[_Layout, ...]]"


class Answers:
    """Runs operations on fake tensors, and those that it has seen, from what it remembers.

    Only such whose answer follows from the shapes, strides and dtypes that they are given and from
    the other arguments: nothing that writes, that depends on data, or that has a symbol in it.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, _Answer | None] = {}

    def of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `func` makes of its arguments."""
        asked: list[FakeTensor] = []
        try:
            if not _is_rememberable(func):
                raise _NotRememberable
            key = (func, torch.get_default_dtype(), _key(args, asked), _key(kwargs, asked))
        except _NotRememberable:
            return func(*args, **kwargs)
        answer = self._known.get(key)
        if answer is not None:
            return _made(answer, asked[0])
        result = func(*args, **kwargs)
        if asked and key not in self._known:
            self._known[key] = _answer(result, asked)
        return result


class _NotRememberable(Exception):
    """An operation, or one of its arguments, says less than its answer depends on."""


@cache
def _is_rememberable(func: Any) -> bool:
    depends = {
        torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view,
    }  # fmt: skip
    return (
        isinstance(func, torch._ops.OpOverload)
        and func.namespace == "aten"
        and not func._schema.is_mutable
        and depends.isdisjoint(func.tags)
        and func.overloadpacket not in (torch.ops.aten.lift, torch.ops.aten.lift_fresh)
    )


_PLAIN = (
    bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


def _key(argument: Any, asked: list[FakeTensor]) -> Hashable:
    """All of an argument that an answer may depend on; its tensors are added to those `asked`."""
    if isinstance(argument, FakeTensor):
        if not _is_ordinary(argument):
            raise _NotRememberable
        asked.append(argument)
        size, stride, offset = argument.shape, argument.stride(), argument.storage_offset()
        return size, stride, offset, argument.dtype, argument.fake_device
    if isinstance(argument, (list, tuple)):
        return (type(argument), *(_key(each, asked) for each in argument))
    if isinstance(argument, dict):
        return tuple((name, _key(each, asked)) for name, each in argument.items())
    if type(argument) not in _PLAIN:
        raise _NotRememberable
    return type(argument), argument  # 1 and 1.0 are equal, and give other dtypes


def _is_ordinary(tensor: FakeTensor) -> bool:
    """Whether its shape, stride, offset, dtype and device say all of it."""
    return (
        tensor.constant is None
        and tensor.layout is torch.strided
        and not tensor._has_symbolic_sizes_strides
        and not tensor.dtype.is_complex
        and not tensor.is_neg()
    )


def _answer(result: Any, asked: list[FakeTensor]) -> _Answer | None:
    """How to make `result` again; None if that is not to be told from the kinds of arguments."""
    if isinstance(result, (list, tuple)):
        found = tuple(layout for each in result if (layout := _layout(each, asked)) is not None)
        if len(found) < len(result):
            return None
        apart = len({_memory(each) for each in result}) == len(result)
        return (type(result), found) if apart or all(layout.shares for layout in found) else None
    return _layout(result, asked)


def _layout(made: Any, asked: list[FakeTensor]) -> _Layout | None:
    if not isinstance(made, FakeTensor) or not _is_ordinary(made) or made.requires_grad:
        return None
    shares = _memory(made) in map(_memory, asked)
    if shares and (len(asked) > 1 or made is asked[0]):
        return None
    return _Layout(
        shape=tuple(made.shape),
        stride=made.stride(),
        offset=int(made.storage_offset()),
        dtype=made.dtype,
        device=made.fake_device,
        shares=shares,
    )


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _made(answer: _Answer, asked: FakeTensor) -> Any:
    with unset_fake_temporarily():
        if isinstance(answer, _Layout):
            return _fake(answer, asked)
        kind, layouts = answer
        return kind(_fake(layout, asked) for layout in layouts)


def _fake(layout: _Layout, asked: FakeTensor) -> FakeTensor:
    if layout.shares:
        empty = torch.empty(0, dtype=layout.dtype, device="meta")
        storage = asked.untyped_storage()
        empty.set_(storage, layout.offset, layout.shape, layout.stride)
    else:
        empty = torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device="meta")
    return FakeTensor(asked.fake_mode, empty, layout.device)
