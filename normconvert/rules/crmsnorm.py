"""Pre-CRMSNorm (arXiv 2305.14858): a vector of mean zero is known by its first d - 1 coordinates.

    CRMSNorm(x) = x / sqrt((Σ x² + (Σ x)²) / d + eps)          section 3.2 of the paper

What writes to the stream drops its last output, and what reads the normalised vector subtracts its
last column from the others. A norm whose readers cannot do that gives back all d coordinates.
"""

from __future__ import annotations

from dataclasses import replace

from normconvert.ir.expression import DropLast, MinusLast
from normconvert.ir.graph import Graph, Norm
from normconvert.ir.native import NormModule
from normconvert.ir.plan import Verdict
from normconvert.rules.axes import Track
from normconvert.rules.draft import Draft, Obstacle, Reader, Readers, Request
from normconvert.rules.places import place_behind
from normconvert.rules.readers import find_readers
from normconvert.rules.scaling import Origins, identity
from normconvert.rules.shift import Shifts
from normconvert.rules.stream import Writer


def crmsnorm(graph: Graph, origins: Origins, draft: Draft, request: Request) -> Draft:
    """Compress every stream that the draft has centered."""
    shifts = Shifts(graph, origins)
    compressed: dict[str, NormModule] = {}
    writers: dict[str, Writer] = {}
    readers: dict[str, Reader] = {}
    copies: dict[str, str] = {}
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
    for tensor, reader in readers.items():
        expressions[tensor] = MinusLast(expressions[tensor], reader.axis)
    for tensor, writer in writers.items():
        expressions[tensor] = DropLast(expressions[tensor], writer.axis)
        if writer.over is not None:
            expressions[writer.over] = DropLast(expressions[writer.over], 0)
    before = {v.norm: v for v in draft.verdicts if v.rule == "rmsnorm"}
    return replace(
        draft,
        expressions=expressions,
        copies={**draft.copies, **copies},
        norms={**draft.norms, **compressed},
        recenterings=tuple(replace(place, compress=True) for place in draft.recenterings),
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
    place = place_behind(graph, shifts, calls[0].outputs[0]) if len(calls) == 1 else None
    return f"{place.module} {place.at}" if place is not None else ""


def _verdict(before: Verdict, module: NormModule | None) -> Verdict:
    if module is None:
        return replace(before, rule="crmsnorm")
    reason = before.reason + (
        ", and what reads it needs all coordinates, which it gives back" if module.expand else ""
    )
    return replace(before, rule="crmsnorm", action="compress", reason=reason)
