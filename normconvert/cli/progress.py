"""Progress bars on stderr, where there is a terminal."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from normconvert.ir.event import Event, Listener, ignore

if TYPE_CHECKING:
    from collections.abc import Iterator

_TITLES = {
    "tracing": "Tracing the model",
    "writing": "Writing the weights",
    "streaming": "Streaming the weights",
    "certifying": "Checking the weights",
    "verifying": "Comparing the logits",
    "measuring": "Measuring",
}


@contextmanager
def progress(*, hidden: bool) -> Iterator[Listener]:
    """A listener that draws a bar for each stage; silent when hidden or not a terminal."""
    if hidden or not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when huggingface_hub is imported
        yield ignore
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:

        def listen(event: Event) -> None:
            if event.stage not in tasks:
                tasks[event.stage] = bars.add_task(_TITLES[event.stage])
            total = None if event.stage == "tracing" and not event.done else event.total
            bars.update(tasks[event.stage], completed=event.done, total=total)

        yield listen
