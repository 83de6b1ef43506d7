"""Recording: a dispatch mode that turns every ATen operation into a node of the graph."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from normconvert.errors import TraceError
from normconvert.ir.graph import Argument, Node, Ref, Size, Value
from normconvert.trace.answers import Answers

if TYPE_CHECKING:
    from collections.abc import Iterator


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what runs inside it. Tensors are told apart by identity, so all are kept alive.

    In-place operations become ordinary ones that make a new value; every other tensor that
    shares the overwritten memory becomes a value of an ``overwritten`` node, which no rule
    knows, so that nothing is concluded about it.
    """

    def __init__(self, *, found: int | None = None, unused: int = 0, invents: bool = False) -> None:
        """With `found`, data is made up where a model's code must know it.

        A search (`nonzero`) finds so many elements, but in a vector all of them, save for so many
        `unused` ones at its end. An index that is
        read from a tensor is 0, then 1, and so on up to the size of the last vector that was
        searched: so a loop over the experts that are hit meets every one of them, and whatever
        the model's code does for some only is seen.

        If it `invents`, all integers that depend on data are 0 and all decisions are true, and
        what is computed of these is known. Each number that the model's code asks for is counted;
        the one that is `turned` is told otherwise, so that the code may go another way.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.found, self._unused = found, unused
        self._index, self._indices = -1, 1
        self.values: list[Value] = []
        self.nodes: list[Node] = []
        self.module = ""
        self.paused = False
        self.invents = invents
        self.computes = invents
        """Whether operations on known numbers, such as the sizes of images, are carried out."""
        self.asked, self.turned = 0, -1
        self.most_nodes = math.inf
        """A pass that would need more is broken off: its code loops over what it is given."""
        self._stale: set[int] = set()
        self._answers = Answers()
        self._value_of: dict[int, int] = {}
        self._sharing: dict[int, list[torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        operator = _operator(func)
        named = {**dict(zip(operator.inputs, args, strict=False)), **kwargs}
        if func is torch.ops.aten.cat.default:
            named["tensors"] = _not_empty(named["tensors"])
        arguments = tuple((name, self._argument(value)) for name, value in named.items())
        written = [named[name] for name in operator.written if name in named]
        if self.computes and self._are_known((args, kwargs), written):
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
            if self.invents and func is torch.ops.aten._local_scalar_dense.default:
                result = self._told(result)
        else:
            result = self._made_up(func, args)
            if func is torch.ops.aten.stack.default:
                result = _stacked(*args, **kwargs)
            if result is None:
                result = self._answers.of(func, args, kwargs)
            if self.invents and not written:
                result = tree_map(_invented, result)
        overwritten = _tensors(written)
        fresh = [t for t in _tensors(result) if not any(t is other for other in overwritten)]
        self._add(operator.name, arguments, [*overwritten, *fresh])
        for tensor in overwritten:
            self._overwrite_sharers(tensor)
        return result

    def _are_known(self, read: Any, written: list[Any]) -> bool:
        """Whether all numbers that an operation reads are known.

        Not those of a tensor, on whatever memory, over which unknown ones were written.
        """
        tensors = _tensors(read)
        real = {_storage(t) for t in tensors if not isinstance(t, FakeTensor)}
        known = not any(isinstance(t, FakeTensor) for t in tensors) and not real & self._stale
        if not known:
            self._stale |= real & {_storage(t) for t in _tensors(written)}
        return known

    def _made_up(self, func: Any, args: tuple[Any, ...]) -> torch.Tensor | int | None:
        if self.found is None:
            return None
        if func is torch.ops.aten.nonzero.default:
            searched, count = args[0], self.found
            if searched.ndim == 1 and isinstance(searched.shape[0], int):
                count = self._indices = max(1, searched.shape[0] - self._unused)
                self._index = -1
            found: torch.Tensor = searched.new_empty((count, searched.ndim), dtype=torch.int64)
            return found
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.int64:
            self._index = (self._index + 1) % self._indices
            return self._index
        return None

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Whatever is recorded inside is forgotten if it ends in an error."""
        values, nodes, value_of = list(self.values), list(self.nodes), dict(self._value_of)
        sharing = {storage: list(tensors) for storage, tensors in self._sharing.items()}
        try:
            yield
        except BaseException:
            self.values, self.nodes, self._value_of = values, nodes, value_of
            self._sharing, self.module, self.paused = sharing, "", False
            raise

    def _told(self, number: bool | int) -> bool | int:
        self.asked += 1
        if self.asked - 1 != self.turned:
            return number
        return not number if isinstance(number, bool) else number + 1

    def value(self, tensor: torch.Tensor) -> int:
        """The value that `tensor` holds now; one not seen before is a constant."""
        known = self._value_of.get(id(tensor))
        if known is not None:
            return known
        sharers = self._sharing.get(_storage(tensor))
        if not sharers:
            return self.new_value(tensor)
        base = self._value_of[id(sharers[0])]
        self._add("alias_of_unknown_layout", (("self", Ref(base)),), [tensor])
        return self._value_of[id(tensor)]

    def known(self, argument: object) -> int | None:
        """The value of `argument` if it is a tensor that has one."""
        return self._value_of.get(id(argument)) if isinstance(argument, torch.Tensor) else None

    def new_value(self, tensor: torch.Tensor) -> int:
        """Give `tensor` a new value."""
        if id(tensor) not in self._value_of:
            self._sharing.setdefault(_storage(tensor), []).append(tensor)
        self._value_of[id(tensor)] = len(self.values)
        self.values.append(Value(shape=_shape(tensor), dtype=str(tensor.dtype).split(".")[1]))
        return len(self.values) - 1

    def add_call(
        self, op: str, arguments: dict[str, torch.Tensor | None], output: torch.Tensor
    ) -> None:
        """Record a whole call of a module as the one node `op`."""
        named = tuple((name, self._argument(value)) for name, value in arguments.items())
        self._add(op, named, [output])

    def _add(
        self, op: str, arguments: tuple[tuple[str, Argument], ...], outputs: list[torch.Tensor]
    ) -> None:
        if len(self.nodes) >= self.most_nodes:
            raise TraceError("it takes too many operations.")
        values = tuple(self.new_value(tensor) for tensor in outputs)
        self.nodes.append(Node(op=op, arguments=arguments, outputs=values, module=self.module))

    def _overwrite_sharers(self, tensor: torch.Tensor) -> None:
        for other in tuple(self._sharing.get(_storage(tensor), ())):
            if other is not tensor:
                reads = (
                    ("self", Ref(self._value_of[id(other)])),
                    ("by", Ref(self._value_of[id(tensor)])),
                )
                self._add("overwritten", reads, [other])

    def _argument(self, value: Any) -> Argument:
        if isinstance(value, torch.Tensor):
            return Ref(self.value(value))
        if isinstance(value, (list, tuple)):
            return tuple(self._argument(item) for item in value)
        if value is None or isinstance(value, (bool, int, float)):
            return value
        return str(value)


def _not_empty(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """What `cat` joins: empty vectors, with which caches begin, fit anything and add nothing."""
    return [tensor for tensor in tensors if _shape(tensor) != (0,)] or tensors


def _stacked(tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor | None:
    """Tensors of one kind as a stack: the fake mode would look at each of hundreds of experts.

    None if they are not of one kind.
    """
    first = tensors[0]
    kind = (first.shape, first.dtype, first.device)
    if not all((t.shape, t.dtype, t.device) == kind and t.is_contiguous() for t in tensors):
        return None
    axis = dim % (first.ndim + 1)
    return first.new_empty((*first.shape[:axis], len(tensors), *first.shape[axis:]))


def _invented(result: Any) -> Any:
    """Numbers for a tensor of integers or decisions whose own are not known."""
    known = not isinstance(result, FakeTensor) or not all(isinstance(n, int) for n in result.shape)
    if known or result.is_floating_point() or result.is_complex():
        return result
    with unset_fake_temporarily():
        return torch.full(result.shape, result.dtype is torch.bool, dtype=result.dtype)


@dataclass(frozen=True, slots=True)
class _Operator:
    """What the schema of an operator says: its name, its inputs, and those that it writes to.

    The name is ``mm`` for aten.mm.default and mm_ alike; with the namespace if it is not aten.
    ``mm.out`` if the result is written over a tensor given for it: no rule knows that.
    """

    name: str
    inputs: tuple[str, ...]
    written: tuple[str, ...]


@cache
def _operator(func: Any) -> _Operator:
    """Read once of each: torch makes its schema anew whenever it is asked."""
    schema = func._schema
    namespace, _, name = schema.name.partition("::")
    if any(argument.is_out for argument in schema.arguments):
        name += ".out"
    if schema.is_mutable and name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return _Operator(
        name=str(name if namespace == "aten" else f"{namespace}::{name}"),
        inputs=tuple(argument.name for argument in schema.arguments),
        written=tuple(
            argument.name
            for argument in schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ),
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors that `value` is or holds."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _shape(tensor: torch.Tensor) -> tuple[Size, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in tensor.shape)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
