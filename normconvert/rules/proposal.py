"""What a rule is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from normconvert.ir.expression import Expression
from normconvert.ir.graph import Graph
from normconvert.ir.plan import Tied, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user chose. `keep` names norms that must stay, each with the reason."""

    tied: Tied
    keep: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A rule's verdict on every norm and the new expression of every tensor it changes.

    A name that the checkpoint does not have is a new tensor with the shape of `copies`' value.
    """

    verdicts: tuple[Verdict, ...]
    expressions: Mapping[str, Expression]
    copies: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


UNTIED = ("tie_word_embeddings", False)
"""The key and value in config.json that make transformers keep tied parameters apart."""

Rule: TypeAlias = Callable[[Graph, Mapping[str, Expression], Request], Proposal]
"""A rule: the graph, every tensor's current expression, the request."""
