"""Pre-CRMSNorm (arXiv 2305.14858): a vector of mean zero is known by its first d - 1 coordinates.

    CRMSNorm(x) = x / sqrt((Σ x² + (Σ x)²) / d + eps)          section 3.2 of the paper

What writes to the stream drops its last output, and what reads the normalised vector subtracts its
last column from the others. A norm whose readers cannot do that gives back all d coordinates.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from normconvert.ir.expression import DropLast, MinusLast
from normconvert.ir.graph import Graph, Norm
from normconvert.ir.native import FullWidth, NormModule, Recentering, starred
from normconvert.ir.plan import Verdict
from normconvert.rules.axes import Track
from normconvert.rules.draft import Draft, Obstacle, Reader, Readers, Request
from normconvert.rules.origins import Origins
from normconvert.rules.places import passed_on, place_behind
from normconvert.rules.readers import find_readers
from normconvert.rules.scaling import identity
from normconvert.rules.shift import Shifts
from normconvert.rules.stream import Writer


def crmsnorm(graph: Graph, origins: Origins, draft: Draft, request: Request) -> Draft:
    """Compress every stream that the draft has centered."""
    shifts = Shifts(graph, origins)
    compressed: dict[str, NormModule] = {}
    writers: dict[str, Writer] = {}
    readers: dict[str, Reader] = {}
    copies: dict[str, str] = {}
    wide = _full_width(graph, shifts, draft, request)
    for stream in draft.streams:
        writers.update(stream.writers)
        for norm in stream.norms:
            found = _readers(graph, origins, draft, norm, request)
            if found is not None:
                readers.update(found.readers)
                copies.update(found.copies)
            compressed[norm.module] = replace(
                draft.norms[norm.module],
                kind="crmsnorm",
                zero_mean=False,
                expand=found is None,
                reader=_place(graph, shifts, norm) if found is None else "",
            )
    expressions = {**{c: draft.expressions[t] for c, t in copies.items()}, **draft.expressions}
    kept = _tensors_within(graph, origins, set(wide))
    for tensor in readers.keys() - kept:
        expressions[tensor] = MinusLast(expressions[tensor], readers[tensor].axis)
    for tensor in writers.keys() - kept:
        expressions[tensor] = DropLast(expressions[tensor], writers[tensor].axis)
    for over in {writers[tensor].over for tensor in writers.keys() - kept}:
        if over is not None:
            expressions[over] = DropLast(expressions[over], 0)
    before = {v.norm: v for v in draft.verdicts if v.rule == "rmsnorm"}
    return replace(
        draft,
        expressions=expressions,
        copies={**draft.copies, **copies},
        norms={**draft.norms, **compressed},
        full_width=tuple(
            FullWidth(module=module, at="" if compressed[norm].expand else at)
            for module, (norm, at) in wide.items()
        ),
        recenterings=tuple(_compressing(draft.recenterings, wide)),
        verdicts=(
            *draft.verdicts,
            *(_verdict(before[norm.module], compressed.get(norm.module)) for norm in graph.norms),
        ),
    )


def _readers(
    graph: Graph, origins: Origins, draft: Draft, norm: Norm, request: Request
) -> Readers | None:
    """What reads the bare normalised vector, if all of it can do with d - 1 coordinates."""
    found: Readers | Obstacle | None = draft.folded.get(norm.module)
    if norm.gain is None and norm.bias is None:
        found = find_readers(graph, origins, (norm,), request.tied)
    if not isinstance(found, Readers):
        return None
    whole = all(
        identity(Track(reader.axis, reader.index), len(reader.index))
        for reader in found.readers.values()
    )
    return found if whole else None


def _place(graph: Graph, shifts: Shifts, norm: Norm) -> str:
    """In front of which module the output of `norm` is best expanded, if not at once.

    Between the two, a model may well expect the shape of its compressed stream.
    """
    calls = graph.norm_calls[norm.module]
    places = {place_behind(graph, shifts, call.outputs[0]) for call in calls}
    place = places.pop()
    return f"{place.module} {place.at}" if place is not None and not places else ""


def _full_width(
    graph: Graph, shifts: Shifts, draft: Draft, request: Request
) -> dict[str, tuple[str, str]]:
    """The modules that must keep all coordinates: the norm that each reads, and at which input.

    A module that the request names may have no input or output of its own on the stream; then
    it is the nearest one around it that has.
    """
    normalised = {
        value: norm.module
        for stream in draft.streams
        for norm in stream.norms
        for node in graph.norm_calls[norm.module]
        for value in passed_on(graph, shifts, node.outputs[0])
    }
    found: dict[str, tuple[str, str]] = {}
    modules = [call.module for call in graph.calls if starred(call.module) in request.full_width]
    for failed in sorted(modules, key=len):
        if any(failed.startswith(f"{outer}.") for outer in found):
            continue
        around = [call for call in graph.calls if f"{failed}.".startswith(f"{call.module}.")]
        for call in sorted(around, key=lambda call: len(call.module), reverse=True):
            inputs = [(key, value) for key, value in call.inputs if value in normalised]
            if call.module and len(inputs) == 1 and call.output is not None:
                key, value = inputs[0]
                found[call.module] = (normalised[value], f"input {key}")
                break
    return found


def _compressing(places: tuple[Recentering, ...], wide: Collection[str]) -> Iterator[Recentering]:
    """The recenterings, which compress as well: but not within a module of full width."""
    for place in places:
        if place.at == "output" and place.module in wide:
            continue  # it compresses its output, and so recenters it
        inside = any(place.module.startswith(f"{module}.") for module in wide)
        yield replace(place, compress=not inside)


def _tensors_within(graph: Graph, origins: Origins, modules: set[str]) -> set[str]:
    """The tensors that the parameters of `modules` are loaded from."""
    return {
        tensor
        for name, value in graph.parameters
        if any(name.startswith(f"{module}.") for module in modules)
        for tensor in origins.tensors(value)
    }


def _verdict(before: Verdict, module: NormModule | None) -> Verdict:
    if module is None:
        return replace(before, rule="crmsnorm")
    reason = before.reason + (
        ", and what reads it needs all coordinates, which it gives back" if module.expand else ""
    )
    return replace(before, rule="crmsnorm", action="compress", reason=reason)
