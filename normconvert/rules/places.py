"""Places: the values of a graph that can be changed by putting something at a module's boundary."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from normconvert.ir.graph import Graph
from normconvert.ir.native import Recentering
from normconvert.rules.axes import Shape
from normconvert.rules.shift import Shift, Shifts


def places(graph: Graph) -> dict[int, tuple[Recentering, ...]]:
    """The values that a module alone makes, or that one alone reads, and where to change them.

    There may be several places for a value: in another pass, it may be another value that is there.
    A norm is no place to recenter in front of: that would be a LayerNorm in two steps.
    """
    norms = graph.norms_by_module
    once = _called_once(graph)
    found: dict[int, dict[Recentering, None]] = {}
    for call in graph.calls:
        if call.module not in once or not call.module:
            continue
        for key, value in call.inputs:
            if call.module not in norms and _all_within(graph, call.module, value):
                place = Recentering(module=call.module, at=f"input {key}")
                found.setdefault(value, {})[place] = None
        value = -1 if call.output is None else call.output
        producer = graph.producers.get(value)
        inside = producer is not None and _within(call.module, graph.nodes[producer].module)
        if inside and not _any_within(graph, call.module, value):
            found.setdefault(value, {})[Recentering(module=call.module, at="output")] = None
    return {value: tuple(at) for value, at in found.items()}


def _called_once(graph: Graph) -> frozenset[str]:
    """The modules that no pass calls twice."""
    times = Counter((call.module, call.run) for call in graph.calls)
    twice = {module for (module, _), count in times.items() if count > 1}
    return frozenset(call.module for call in graph.calls) - twice


# Inputs that write nothing to a residual stream. From `input_ids` the module makes embeddings, but
# only where the model does not hand them in, as it did in the trace.
_WRITES_NOTHING = frozenset({
    "input_ids", "attention_mask", "position_ids", "position_embeddings", "past_key_values",
    "cache", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
    "return_dict",
})  # fmt: skip


def entrance(
    graph: Graph, value: int, within: Collection[str], without: Collection[str]
) -> Recentering | None:
    """The input of a module that `value` is, if nothing else can write to a stream in that module.

    The module contains all modules `within`, and no parameter `without`.
    """
    once = _called_once(graph)
    for call in graph.calls:
        key = next((key for key, given in call.inputs if given == value), None)
        if (
            key is not None
            and call.module in once
            and _WRITES_NOTHING.issuperset(call.unused)
            and all(_within(call.module, each) for each in within)
            and not any(_within(call.module, each) for each in without)
            and _all_within(graph, call.module, value)
        ):
            return Recentering(module=call.module, at=f"input {key}")
    return None


def unseen_writers(graph: Graph, norms: Iterable[str], size: int) -> tuple[str, ...]:
    """The parameters that may write to the stream of that size which `norms` read, unseen.

    None that the trace read, but what becomes of a tower's output is seen only in a pass of the
    whole model: where the norms run in one, what only towers apart read may write to the stream.
    """
    made = (out for norm in norms for node in graph.norm_calls[norm] for out in node.outputs)
    of_the_whole = not graph.behind_outputs.isdisjoint(made)
    seen = graph.behind_outputs if of_the_whole else graph.live_consumers
    return tuple(
        name
        for name, value in graph.parameters
        if value not in seen and _several(graph.values[value].shape, size)
    )


def _several(shape: Shape, size: int) -> bool:
    """Whether a tensor of that shape may be taken for vectors of that size, side by side too."""
    return any(isinstance(each, int) and each and each % size == 0 for each in shape)


def unread_beside(graph: Graph, values: frozenset[int], size: int) -> str | None:
    """A parameter that code which did not run in the trace may read `values`, of that size, with.

    That is code of a module that has one of the values at hand: it made it, was given it, or got it
    back from another module.
    """
    candidates = tuple(_unread_readers(graph, size))
    if not candidates:
        return None
    called = {call.module for call in graph.calls}
    seeing = {_nearest(called, graph.nodes[i].module) for i in _touching(graph, values)}
    for call in graph.calls:
        given = not values.isdisjoint(value for _, value in call.inputs)
        if given:
            seeing.add(call.module)
        if given or not values.isdisjoint(call.outputs):
            seeing.add(_caller(called, call.module))
    for name in candidates:
        place = _caller(called, name)
        # Which member of a list runs, the code says by itself unless it looks at data.
        if place in seeing and (graph.searched or not _another_is_read(graph, place, name)):
            return name
    return None


def _unread_readers(graph: Graph, size: int) -> Iterator[str]:
    """The parameters that the trace did not read and that can multiply `size` features.

    A layer may read several things side by side.
    """
    widths = dict(graph.widths)
    for name, value in graph.untouched_parameters:
        fitting = (widths[name],) if name in widths else graph.values[value].shape
        if _several(fitting, size):
            yield name


def _another_is_read(graph: Graph, place: str, name: str) -> bool:
    """Whether another member of the outermost list in `place` that `name` is in was read there."""
    own = name.removeprefix(f"{place}.").split(".")
    at = next((i for i, part in enumerate(own) if part.isdigit()), None)
    if at is None:
        return False
    before, behind = ".".join([*([place] if place else []), *own[:at], ""]), ".".join(own[at + 1 :])
    pattern = re.compile(rf"{re.escape(before)}\d+\.{re.escape(behind)}")
    read = (each for each, value in graph.parameters if value in graph.consumers)
    return any(pattern.fullmatch(each) for each in read)


def _touching(graph: Graph, values: frozenset[int]) -> set[int]:
    """The nodes that make or read one of the `values`."""
    made = {graph.producers[value] for value in values if value in graph.producers}
    return made.union(*(graph.consumers.get(value, ()) for value in values))


def _nearest(called: Collection[str], path: str) -> str:
    """The innermost of the `called` modules that `path` is or is in."""
    while path and path not in called:
        path = path.rpartition(".")[0]
    return path


def _caller(called: Collection[str], path: str) -> str:
    return _nearest(called, path.rpartition(".")[0])


def _within(module: str, path: str) -> bool:
    return path == module or path.startswith(module + ".")


def _all_within(graph: Graph, module: str, value: int) -> bool:
    readers = graph.live_consumers.get(value, ())
    return bool(readers) and all(_within(module, graph.nodes[i].module) for i in readers)


def _any_within(graph: Graph, module: str, value: int) -> bool:
    return any(_within(module, graph.nodes[i].module) for i in graph.live_consumers.get(value, ()))


def passed_on(graph: Graph, shifts: Shifts, value: int) -> set[int]:
    """`value` and what it is when its other axes than the last are rearranged."""
    found, waiting = {value}, [value]
    while waiting:
        current = waiting.pop()
        shift = Shift(len(graph.values[current].shape) - 1)
        for position in graph.live_consumers.get(current, ()):
            if graph.nodes[position].inputs != (current,):
                continue
            for output, moved in (shifts.through(position, 0, shift) or {}).items():
                if moved.axis == len(graph.values[output].shape) - 1 and output not in found:
                    found.add(output)
                    waiting.append(output)
    return found


def place_behind(graph: Graph, shifts: Shifts, value: int) -> Recentering | None:
    """In front of which module `value` arrives, with all its features, and nowhere else."""
    known = places(graph)
    outputs = {output for _, output in graph.returned}
    shift = Shift(len(graph.values[value].shape) - 1)
    found = None
    while True:
        first = known.get(value, ())[:1]
        if first and first[0].at != "output" and value not in outputs:
            found = first[0]
        readers = graph.live_consumers.get(value, ())
        if value in outputs or len(readers) != 1 or graph.nodes[readers[0]].inputs != (value,):
            return found
        moved = shifts.through(readers[0], 0, shift)
        if moved is None or len(moved) != 1:
            return found
        value, shift = next(iter(moved.items()))
        if shift.axis != len(graph.values[value].shape) - 1:
            return found
