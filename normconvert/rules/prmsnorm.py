"""pRMSNorm (arXiv 1910.07467, section 4.1): the RMS of some coordinates stands for that of all.

An approximation, never equivalent: the weights stay as they are, the norms compute something else.
"""

from __future__ import annotations

from dataclasses import replace

from normconvert.ir.graph import Graph, Norm
from normconvert.ir.native import NormModule
from normconvert.ir.plan import Verdict
from normconvert.rules.draft import Draft, Request
from normconvert.rules.scaling import Origins


def prmsnorm(graph: Graph, origins: Origins, draft: Draft, request: Request) -> Draft:
    """Make every RMSNorm a partial one."""
    found = {
        norm.module: NormModule(
            module=norm.module,
            kind="prmsnorm",
            size=_size(graph, norm),
            eps=norm.eps,
            offset=norm.offset if norm.gain is not None else 0.0,
            gain=norm.gain is not None,
            bias=norm.bias is not None,
            fraction=request.fraction,
        )
        for norm in graph.norms
        if norm.kind == "rmsnorm"
    }
    verdicts = tuple(
        Verdict(
            rule="prmsnorm",
            norm=norm.module,
            kind=norm.kind,
            gain=origins.vector(norm.gain),
            bias=origins.vector(norm.bias),
            offset=norm.offset,
            eps=norm.eps,
            readers=(),
            action="approximate" if norm.module in found else "keep",
            reason=f"it sees {request.fraction:.2%} of its input"
            if norm.module in found
            else "it is no RMSNorm",
        )
        for norm in graph.norms
    )
    return replace(draft, norms={**draft.norms, **found}, verdicts=(*draft.verdicts, *verdicts))


def _size(graph: Graph, norm: Norm) -> int:
    size = graph.values[graph.norm_calls[norm.module][0].inputs[0]].shape[-1]
    assert isinstance(size, int)
    return size
