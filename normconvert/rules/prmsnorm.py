"""pRMSNorm (arXiv 1910.07467, section 4.1): the RMS of some coordinates stands for that of all.

An approximation, never equivalent: the weights stay as they are, the norms compute something else.
"""

from __future__ import annotations

from dataclasses import replace

from normconvert.ir.graph import Graph, Norm
from normconvert.ir.native import NormModule
from normconvert.rules.draft import Draft, Request, verdict_on
from normconvert.rules.origins import Origins


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
    seen = f"it sees {request.fraction:.2%} of its input"
    verdicts = tuple(
        verdict_on(origins, norm, "prmsnorm", "approximate", seen)
        if norm.module in found
        else verdict_on(origins, norm, "prmsnorm", "keep", "it is no RMSNorm")
        for norm in graph.norms
    )
    return replace(draft, norms={**draft.norms, **found}, verdicts=(*draft.verdicts, *verdicts))


def _size(graph: Graph, norm: Norm) -> int:
    size = graph.values[graph.norm_calls[norm.module][0].inputs[0]].shape[-1]
    assert isinstance(size, int)
    return size
