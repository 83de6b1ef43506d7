"""Progress, as the stages tell it to whoever listens (a progress bar, a test, nobody)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Event:
    """`done` of `total` units of `stage` are finished: bytes while writing, passes in verify."""

    stage: str
    done: int
    total: int


Listener: TypeAlias = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Listen to nothing."""
