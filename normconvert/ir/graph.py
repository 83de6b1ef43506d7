"""The graph: what one forward pass of a checkpoint's own model computes.

`trace` makes it, `rules` read it. Values are numbered; every node makes some values out of
others. The leaves are the checkpoint's tensors *as they are on disk*: the operations that a
model class applies while loading (renaming, stacking experts, transposing) are nodes like any
other, so whatever is proved on the graph is proved in the checkpoint's own namespace.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias

Size: TypeAlias = "int | str"
"""A size of a shape; a string where it is known only at run time (data-dependent)."""


@dataclass(frozen=True, slots=True)
class Ref:
    """A use of a value among a node's arguments."""

    value: int


Argument: TypeAlias = "Ref | int | float | str | tuple[Argument, ...] | None"


@dataclass(frozen=True, slots=True)
class Value:
    """Shape and dtype of one tensor of the forward pass."""

    shape: tuple[Size, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operation: an ATen operator by its name without overload, or ``norm``.

    A ``norm`` node stands for a whole call of a module that was recognised as a norm; its
    arguments are ``input``, ``gain`` and ``bias``. Argument names are the operator's own.
    """

    op: str
    arguments: tuple[tuple[str, Argument], ...]
    outputs: tuple[int, ...]
    module: str

    def argument(self, name: str, default: Argument = None) -> Argument:
        """The argument called `name`, or `default` where the call left it out."""
        return next((value for key, value in self.arguments if key == name), default)

    @cached_property
    def inputs(self) -> tuple[int, ...]:
        """The values read, in the order of the arguments."""
        return tuple(ref.value for _, argument in self.arguments for ref in _refs(argument))

    def __str__(self) -> str:
        outputs = ", ".join(f"%{value}" for value in self.outputs)
        arguments = ", ".join(f"{key}={_text(value)}" for key, value in self.arguments)
        return f"{outputs} = {self.op}({arguments})  # {self.module}"


NormKind: TypeAlias = Literal["rmsnorm", "layernorm", "unrecognised"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """One norm module, by what it computes on its last axis.

    rmsnorm:   x / sqrt(mean(x²) + eps) · (offset + gain)
    layernorm: (x - mean(x)) / sqrt(var(x) + eps) · (offset + gain) + bias
    unrecognised: invariant to the scale of its input, but none of these formulas.

    `gain` and `bias` are values of the graph, None where the norm has none.
    """

    module: str
    kind: NormKind
    gain: int | None
    bias: int | None
    offset: float
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """A parameter that the model keeps equal to another one, `source`, on purpose.

    The output head and the embedding, most often. `tensor` is the name under which the
    parameter can be stored on its own (None if there is none), and `stored` tells whether the
    checkpoint has it already.
    """

    parameter: str
    source: str
    tensor: str | None
    stored: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a module: where something can be put in front of it or behind it.

    `run` is the number of the pass: 0 is the first one, of the whole model.

    `inputs` are its tensors by position or keyword, `unused` the names of those inputs that it was
    not given. `outputs` are all tensors in what it returned, `output` is None if that was anything
    but one tensor.
    """

    module: str
    inputs: tuple[tuple[int | str, int], ...]
    unused: tuple[str, ...]
    outputs: tuple[int, ...]
    output: int | None
    run: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A further pass that could not be run: what it was, in which module, and why (a sentence).

    `tower` is the path of the part that it was to run, empty for a pass of the whole model on text.
    """

    what: str
    module: str
    why: str
    tower: str = ""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A traced model. See the module's docstring.

    `outputs` are those of the first pass, `other_outputs` the same ones of each further pass: on a
    long input, or on another way through the model's code. `passes` are the first node of each
    such pass, and what is other in it.
    `auto_classes` are transformers' classes that load it. `open_biases` maps the weight of each
    Linear without a bias to the name that a bias would have, in the model and on disk. `tie_key`
    is the key of config.json that says whether parameters are tied. `towers` are what parts of the
    model return that a pass on text leaves out: for images, by themselves and with all that makes
    of them what the text model reads; `apart` are those of them of which no pass shows what becomes
    of them in the whole model. `widths` tells how many features at once the layer of a
    parameter multiplies by it, where the layer is of a class that says so. `searched` says that
    what a search finds was made up. `not_run` are norms of the model that no pass runs. `failed`
    are further passes that could not be run.
    """

    model: str
    auto_classes: tuple[str, ...]
    values: tuple[Value, ...]
    nodes: tuple[Node, ...]
    leaves: tuple[tuple[str, int], ...]
    parameters: tuple[tuple[str, int], ...]
    norms: tuple[Norm, ...]
    ties: tuple[Tie, ...]
    outputs: tuple[tuple[str, int], ...]
    calls: tuple[Call, ...]
    open_biases: tuple[tuple[str, str], ...]
    tie_key: str = "tie_word_embeddings"
    other_outputs: tuple[tuple[tuple[str, int], ...], ...] = ()
    passes: tuple[tuple[int, str], ...] = ()
    towers: tuple[tuple[str, int], ...] = ()
    apart: tuple[tuple[str, int], ...] = ()
    widths: tuple[tuple[str, int], ...] = ()
    searched: bool = False
    not_run: tuple[Norm, ...] = ()
    failed: tuple[Failure, ...] = ()

    def returning(self, names: tuple[str, ...]) -> Graph:
        """The graph that only has the outputs `names`, such as pooler_output.

        Raises:
            KeyError: the model has no output of one of the names.
        """
        if missing := set(names) - set(self.output_fields):
            raise KeyError(min(missing))
        return replace(
            self,
            outputs=tuple(each for each in self.outputs if _field(each) in names),
            other_outputs=tuple(
                tuple(each for each in outputs if _field(each) in names)
                for outputs in self.other_outputs
            ),
        )

    @property
    def output_fields(self) -> tuple[str, ...]:
        """The name that each output goes by in what the model returns."""
        return tuple(map(_field, self.outputs))

    @property
    def returned(self) -> tuple[tuple[str, int], ...]:
        """All that leaves the graph: the outputs, and what the towers return."""
        others = tuple(
            (f"{name} of pass {i}", value)
            for i, outputs in enumerate(self.other_outputs, 2)
            for name, value in outputs
        )
        return self.outputs + others + self.towers

    def where(self, position: int) -> str:
        """The module that runs the node at `position`; in a further pass, also what is other."""
        module = self.nodes[position].module or self.model
        at = self.pass_of(position)
        return f"{module} {self.passes[at - 1][1]}".rstrip() if at else module

    def pass_of(self, position: int) -> int:
        """The number of the pass that has the node at `position`; 0 is the first one."""
        return bisect_right(self.passes, position, key=lambda each: each[0])

    @cached_property
    def leaf_names(self) -> dict[int, str]:
        """Value of a leaf -> name of the tensor on disk."""
        return {value: name for name, value in self.leaves}

    @cached_property
    def leaf_values(self) -> dict[str, int]:
        """Name of the tensor on disk -> its value."""
        return dict(self.leaves)

    @cached_property
    def parameter_values(self) -> dict[str, int]:
        """Name of a parameter of the model -> its value."""
        return dict(self.parameters)

    @cached_property
    def producers(self) -> dict[int, int]:
        """Value -> position of the node that makes it (leaves and constants have none)."""
        return {out: i for i, node in enumerate(self.nodes) for out in node.outputs}

    @cached_property
    def consumers(self) -> dict[int, tuple[int, ...]]:
        """Value -> positions of the nodes that read it."""
        found: dict[int, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for value in dict.fromkeys(node.inputs):
                found.setdefault(value, []).append(i)
        return {value: tuple(nodes) for value, nodes in found.items()}

    @cached_property
    def live_consumers(self) -> dict[int, tuple[int, ...]]:
        """Value -> positions of the nodes that read it and that some output depends on."""
        return self._live(self.returned)

    @cached_property
    def behind_outputs(self) -> frozenset[int]:
        """The values that an output depends on, save for those that are `apart`."""
        apart = set(self.apart)
        whole = tuple(each for each in self.returned if each not in apart)
        return frozenset(self._live(whole)).union(value for _, value in whole)

    def _live(self, returned: tuple[tuple[str, int], ...]) -> dict[int, tuple[int, ...]]:
        needed = {value for _, value in returned}
        found: dict[int, tuple[int, ...]] = {}
        for i in reversed(range(len(self.nodes))):
            node = self.nodes[i]
            if needed.isdisjoint(node.outputs):
                continue
            needed.update(node.inputs)
            for value in dict.fromkeys(node.inputs):
                found[value] = (i, *found.get(value, ()))
        return found

    @property
    def unread(self) -> tuple[str, ...]:
        """Tensors on disk that the model class does not know."""
        return tuple(name for name, value in self.leaves if value not in self.consumers)

    @cached_property
    def unread_parameters(self) -> tuple[str, ...]:
        """Parameters that no output depends on: the pass did not run what they are for."""
        return tuple(name for name, value in self.parameters if value not in self.live_consumers)

    @cached_property
    def untouched_parameters(self) -> tuple[tuple[str, int], ...]:
        """Parameters that no node reads, with their values."""
        return tuple(each for each in self.parameters if each[1] not in self.consumers)

    @cached_property
    def norms_by_module(self) -> dict[str, Norm]:
        """Module path -> the norm."""
        return {norm.module: norm for norm in self.norms}

    @cached_property
    def norm_calls(self) -> dict[str, tuple[Node, ...]]:
        """Module path of a norm -> its calls."""
        found: dict[str, tuple[Node, ...]] = {}
        for node in self.nodes:
            if node.op == "norm":
                found[node.module] = (*found.get(node.module, ()), node)
        return found

    def __str__(self) -> str:
        lines = [f"graph of {self.model}"]
        lines += [f"%{value} = tensor {name!r}" for name, value in self.leaves]
        lines += [str(node) for node in self.nodes]
        lines += [f"output {name} = %{value}" for name, value in self.returned]
        return "\n".join(lines)


def _field(output: tuple[str, int]) -> str:
    return output[0].partition(".")[0]


def _refs(argument: Argument) -> tuple[Ref, ...]:
    if isinstance(argument, Ref):
        return (argument,)
    if isinstance(argument, tuple):
        return tuple(ref for item in argument for ref in _refs(item))
    return ()


def _text(argument: Argument) -> str:
    if isinstance(argument, Ref):
        return f"%{argument.value}"
    if isinstance(argument, tuple):
        return f"[{', '.join(map(_text, argument))}]"
    return str(argument)
