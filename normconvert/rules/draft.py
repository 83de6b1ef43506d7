"""What a rule is given and what it gives back: a draft of the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from normconvert.ir.expression import Expression
from normconvert.ir.graph import Graph, Norm
from normconvert.ir.native import FullWidth, NormModule, Recentering
from normconvert.ir.plan import Action, Format, Tied, Verdict

if TYPE_CHECKING:
    from normconvert.rules.origins import Origins
    from normconvert.rules.scaling import Contraction
    from normconvert.rules.stream import Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user chose, and what was found out.

    `keep` names norms whose gain must stay, each with the reason; `full_width` are modules, with *
    for every number, that only run on vectors of all coordinates.
    """

    format: Format = "stock"
    tied: Tied = "keep"
    fraction: float = 1.0
    full_width: frozenset[str] = frozenset()
    keep: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why something cannot be done: one sentence, and the readers found nevertheless.

    `unknown` says that it may be possible: there is an operation or a structure that no rule knows.
    """

    reason: str
    readers: tuple[str, ...] = ()
    unknown: bool = False


@dataclass(frozen=True, slots=True)
class Reader:
    """A tensor that a norm's output is multiplied with.

    Slice i of its `axis` is to be multiplied by the gain's element ``index[i]``, -1 for none.
    """

    axis: int
    index: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Readers:
    """All readers of a norm by the name of the tensor, and the products in which they read it.

    `copies` maps the name of a new tensor to the tied tensor that it is a copy of.
    """

    readers: Mapping[str, Reader]
    contractions: tuple[Contraction, ...]
    copies: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """The plan as the rules so far have left it.

    `expressions` has every tensor; `copies` says which tensor a new one takes shape and dtype
    from, `biases` the reader whose rows a new bias has. `norms` are the modules that change, by
    path. `folded` are the norms, by path, whose gain (if any) is in these readers and whose
    output is the bare normalised input; `streams` those that have mean zero.
    """

    expressions: Mapping[str, Expression]
    copies: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    omitted: frozenset[str] = frozenset()
    norms: Mapping[str, NormModule] = field(default_factory=dict)
    recenterings: tuple[Recentering, ...] = ()
    full_width: tuple[FullWidth, ...] = ()
    folded: Mapping[str, Readers] = field(default_factory=dict)
    streams: tuple[Stream, ...] = ()
    verdicts: tuple[Verdict, ...] = ()


def verdict_on(
    origins: Origins,
    norm: Norm,
    rule: str,
    action: Action,
    reason: str,
    readers: tuple[str, ...] = (),
    *,
    unknown: bool = False,
) -> Verdict:
    """What `rule` does to `norm`, with the tensors by their names on disk."""
    return Verdict(
        rule=rule,
        norm=norm.module,
        kind=norm.kind,
        gain=origins.vector(norm.gain),
        bias=origins.vector(norm.bias),
        offset=norm.offset,
        eps=norm.eps,
        readers=readers,
        action=action,
        reason=reason,
        unknown=unknown,
    )


Rule: TypeAlias = "Callable[[Graph, Origins, Draft, Request], Draft]"
"""A rule: the graph, what its values are made of, the draft so far, the request."""
