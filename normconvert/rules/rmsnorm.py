"""Pre-RMSNorm (arXiv 2305.14858): a stream of mean zero makes its LayerNorms RMSNorms.

    LayerNorm(x) = RMSNorm(x - mean(x))                    section 3.1 of the paper
    mean(W y + c) = 0  for  W' = W - mean(W), c' = c - mean(c)  over the output axis

So everything that writes to a residual stream is centered, once, in its weights: embeddings,
output and down projections, their biases. A LayerScale behind a projection is first taken into it.
What cannot be centered in its weights (a tied embedding, a norm in front of the first layer) is
recentered by one explicit module, in the native format. The proof is `normconvert.rules.stream`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from normconvert.ir.expression import Center, Expression, Fill, Scale, Tensor
from normconvert.ir.graph import Graph, Norm
from normconvert.ir.native import NormModule
from normconvert.ir.plan import Action, Verdict
from normconvert.rules.draft import Draft, Request, verdict_on
from normconvert.rules.origins import Origins
from normconvert.rules.stream import Stream, find_streams


def rmsnorm(graph: Graph, origins: Origins, draft: Draft, request: Request) -> Draft:
    """Center what writes to every stream where that is legal."""
    native = request.format == "native"
    streams = find_streams(graph, origins, untie=request.tied == "untie", recenter=native)
    whole = tuple(stream for stream in streams if stream.obstacle is None)
    expressions = dict(draft.expressions)
    centered: set[str] = set()
    for stream in whole:
        expressions |= {copy: draft.expressions[source] for copy, source in stream.copies.items()}
        new = {name: w for name, w in stream.writers.items() if name not in centered}
        for tensor, writer in new.items():
            expressions[tensor] = _centered(expressions[tensor], writer.axis, writer.over)
        expressions |= {w.over: Fill(1.0) for w in new.values() if w.over is not None}
        centered |= new.keys()
    copies = {copy: source for stream in whole for copy, source in stream.copies.items()}
    verdicts = {norm.module: _verdict(origins, norm, streams) for norm in graph.norms}
    return replace(
        draft,
        expressions=expressions,
        copies={**draft.copies, **copies},
        norms={**draft.norms, **(_norms(graph, origins, whole) if native else {})},
        recenterings=tuple(place for stream in whole for place in stream.recenterings),
        streams=whole,
        verdicts=(*draft.verdicts, *verdicts.values()),
    )


def _centered(of: Expression, axis: int, over: str | None) -> Expression:
    return Center(of if over is None else Scale(of, axis, Tensor(over)), axis)


def _norms(graph: Graph, origins: Origins, streams: tuple[Stream, ...]) -> Mapping[str, NormModule]:
    return {
        norm.module: NormModule(
            module=norm.module,
            kind="rmsnorm",
            size=stream.size,
            eps=norm.eps,
            offset=norm.offset if norm.gain is not None else 0.0,
            gain=norm.gain is not None,
            bias=norm.bias is not None,
            zero_mean=True,
        )
        for stream in streams
        for norm in stream.norms
    }


def _verdict(origins: Origins, norm: Norm, streams: tuple[Stream, ...]) -> Verdict:
    stream = next((stream for stream in streams if norm in stream.norms), None)
    if stream is None:
        reason = "it is no LayerNorm"
    elif stream.obstacle is not None:
        reason = stream.obstacle.reason
    else:
        reason = "all that writes to the stream that it reads is centered"
        if stream.recenterings:
            places = ", ".join(f"the {place.at} of {place.module}" for place in stream.recenterings)
            reason += f", and {places} is recentered"
    kept = stream is None or stream.obstacle is not None
    unknown = stream is not None and stream.obstacle is not None and stream.obstacle.unknown
    action: Action = "keep" if kept else "center"
    return verdict_on(origins, norm, "rmsnorm", action, reason, unknown=unknown)
