"""Everything that is measured, in its order, as one report."""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import psutil
import torch
import transformers
from torch import nn

from normconvert.benchmark.claims import claims
from normconvert.benchmark.models import load, nbytes, removable, without_norms
from normconvert.benchmark.norms import main_norm, measure_deferred, measure_norms
from normconvert.benchmark.passes import passing, prompt_length, reads_text, tasks
from normconvert.benchmark.rounds import Stopwatch, measured
from normconvert.benchmark.training import TOKENS, step, trained
from normconvert.errors import BenchError, first_line
from normconvert.ir.bench import CEILING, CONVERTED, ORIGINAL, Bench, Measurement, Task
from normconvert.ir.event import Event, Listener
from normconvert.quiet import quiet
from normconvert.torch_threads import torch_threads
from normconvert.verify.placement import free_memory, require_device

if TYPE_CHECKING:
    from normconvert.ir.bench import BenchOptions
    from normconvert.ir.graph import Graph
    from normconvert.source import Checkpoint


def measure(
    graph: Graph,
    original: Checkpoint,
    converted: Checkpoint,
    rules: tuple[str, ...],
    options: BenchOptions,
    listen: Listener,
) -> Bench:
    """What `converted`, on which `rules` were used, buys; `graph` is that of `original`.

    Raises:
        BenchError: one of the models cannot be loaded or run here.
        VerificationError: there is no such device here.
    """
    busy = _busy()
    require_device(options.device)
    device, trust = torch.device(options.device), options.trust_remote_code
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    paths = removable(graph)
    if not paths:
        raise BenchError(f"{original.model} has no norm that is known, so there is no ceiling.")
    with quiet(), torch_threads(options.threads or torch.get_num_threads()):
        model = load(original, dtype, device, trust)
        _require_memory(model, original)
        models = {
            ORIGINAL: model,
            CONVERTED: load(converted, model.dtype, device, trust),
            CEILING: without_norms(model, paths),
        }
        total = 4 + len(tasks(model)) * (1 + options.compile) + 1
        measurements: list[Measurement] = []
        listen(Event("measuring", 0, total))
        for each in chain(
            _norms(model, graph, paths, options.seconds),
            _passes(models, options),
            _training(models, graph, paths, options.seconds),
        ):
            measurements.append(each)
            listen(Event("measuring", len(measurements), total))
        return Bench(
            model=original.model,
            converted=converted.model,
            rules=rules,
            norms=len(paths),
            hidden_size=main_norm(graph, paths)[1],
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(device),
            threads=torch.get_num_threads(),
            processor=_processor(device),
            torch=torch.__version__,
            transformers=transformers.__version__,
            busy=bool(busy),
            measurements=tuple(measurements),
            claims=claims(measurements, rules, busy=bool(busy)),
            notes=(
                *busy,
                *(f"The ceiling keeps {norm}, which is not known." for norm in _kept(graph)),
            ),
        )


def _norms(
    model: Any, graph: Graph, paths: tuple[str, ...], seconds: float
) -> Iterator[Measurement]:
    path, size = main_norm(graph, paths)
    own, like = model.get_submodule(path), torch.empty(0, dtype=model.dtype, device=model.device)
    lengths = (1, prompt_length(model))
    for rows in lengths:
        other = None if type(own) is nn.LayerNorm else own
        yield measure_norms(size, rows, other, like, seconds)
    for rows in lengths:
        yield measure_deferred(size, rows, like, seconds)


def _passes(models: dict[str, Any], options: BenchOptions) -> Iterator[Measurement]:
    length = prompt_length(models[ORIGINAL])
    every = tasks(models[ORIGINAL])
    for task in every:
        yield _pass(task, models, length, options.seconds, compiled=False)
    for task in every if options.compile else ():
        try:
            yield _pass(task, models, length, options.seconds, compiled=True)
        except BenchError as error:
            yield _not_measured(task, length, str(error), compiled=True)
        torch.compiler.reset()


def _pass(
    task: Task, models: dict[str, Any], length: int, seconds: float, *, compiled: bool
) -> Measurement:
    with torch.no_grad():
        watches = {
            name: _watch(task, name, model, length, compiled=compiled)
            for name, model in models.items()
        }
        tokens = length if reads_text(models[ORIGINAL]) else None
        return measured(task, tokens, watches, seconds, compiled=compiled)


def _watch(task: Task, name: str, model: Any, length: int, *, compiled: bool) -> Stopwatch:
    try:
        return passing(task, model, length, compiled=compiled)
    except Exception as error:  # the code of models, and a compiler, may raise anything
        how = "through torch.compile" if compiled else "here"
        raise BenchError(
            f"The {task} of the {name} model cannot be run {how}: {first_line(error)}."
        ) from error


def _training(
    models: dict[str, Any], graph: Graph, paths: tuple[str, ...], seconds: float
) -> Iterator[Measurement]:
    """The models that are not the original leave the memory for those that are trained."""
    model = models[ORIGINAL]
    models.clear()
    gc.collect()
    length = min(TOKENS, prompt_length(model))
    tokens = length if reads_text(model) else None
    layer_norms = any(norm.kind == "layernorm" for norm in graph.norms)
    try:
        contestants, missing = trained(model, paths, layer_norms=layer_norms)
        watches = {name: step(each, length) for name, each in contestants.items()}
    except BenchError as error:
        yield _not_measured("training", tokens, str(error))
    except Exception as error:  # the code of models may raise anything
        yield _not_measured("training", tokens, f"It cannot be trained here: {first_line(error)}.")
    else:
        yield measured("training", tokens, watches, seconds, note=missing)


def _not_measured(
    task: Task, tokens: int | None, why: str, *, compiled: bool = False
) -> Measurement:
    return Measurement(task=task, compiled=compiled, tokens=tokens, rounds=0, timings=(), note=why)


def _require_memory(model: Any, checkpoint: Checkpoint) -> None:
    needed = 2 * nbytes(model)
    if model.device.type == "cpu" and needed > (free := free_memory()):
        raise BenchError(
            f"The converted model and the ceiling take another {needed / 1e9:.1f} GB beside "
            f"{checkpoint.model}, and {free / 1e9:.1f} GB are free; give --dtype bfloat16, or a "
            "smaller model of the same kind."
        )


def _busy() -> tuple[str, ...]:
    """A note if others want the cores: what waits for one is not slowed down alike."""
    load, cores = psutil.getloadavg()[0], os.cpu_count() or 1
    if load <= cores:
        return ()
    return (
        f"The machine was busy when this began (a load of {load:.1f} on {cores} cores), and these "
        "figures say little; measure again when it is not.",
    )


def _kept(graph: Graph) -> list[str]:
    return [norm.module for norm in graph.norms if norm.kind == "unrecognised"]


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
