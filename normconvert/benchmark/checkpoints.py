"""From a checkpoint, or two, to what its conversion buys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from normconvert.api import convert
from normconvert.benchmark.report import measure
from normconvert.errors import NormconvertError
from normconvert.ir.bench import Bench, BenchOptions
from normconvert.ir.event import Event, Listener, ignore
from normconvert.planner import REWRITES, make_plan
from normconvert.settle import rules_done
from normconvert.source import Checkpoint, download, open_checkpoint
from normconvert.trace import trace

if TYPE_CHECKING:
    from normconvert.api import Rewrite
    from normconvert.ir.graph import Graph


def bench(
    model: str | Path,
    converted: str | Path | None = None,
    options: BenchOptions | None = None,
    *,
    revision: str | None = None,
    listen: Listener = ignore,
) -> Bench:
    """What the conversion of `model` buys on this machine: times, in turn with the original's.

    And with the ceiling's, which is the original without its norms. Without `converted`, `model` is
    converted for this in a temporary folder, in the native format and without verification: by
    "rmsnorm" if it has LayerNorms that become RMSNorms, otherwise by "flashnorm".

    Raises:
        NormconvertError: one of them cannot be read, converted or run here.
    """
    options = options or BenchOptions()
    trust = options.trust_remote_code
    original = open_checkpoint(str(model), revision=revision)
    listen(Event("tracing", 0, 1))
    graph = trace(original, trust_remote_code=trust)
    listen(Event("tracing", 1, 1))
    download(original)
    if converted is not None:
        other = open_checkpoint(str(converted))
        download(other)
        return measure(graph, original, other, rules_done(other), options, listen)
    with TemporaryDirectory(prefix="normconvert-bench-") as folder:
        done = convert(
            model,
            Path(folder, "converted"),
            _fitting(graph, original),
            format="native",
            verify=False,
            revision=revision,
            trust_remote_code=trust,
            listen=listen,
        )
        if done.output is None:
            raise NormconvertError(
                f"{model} is converted already; give the original first: normconvert bench "
                f"ORIGINAL {model}."
            )
        other = open_checkpoint(done.output)
        report = measure(graph, original, other, rules_done(other), options, listen)
    return replace(report, converted=None)


def _fitting(graph: Graph, checkpoint: Checkpoint) -> Rewrite:
    """The rewrite that changes what the norms of a checkpoint compute, if there is one."""
    if any(norm.kind == "layernorm" for norm in graph.norms):
        plan = make_plan(graph, checkpoint, REWRITES["rmsnorm"], format="native")
        if plan.changed("rmsnorm"):
            return "rmsnorm"
    return "flashnorm"
