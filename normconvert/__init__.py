"""normconvert rewrites the normalization layers of Hugging Face checkpoints exactly.

    import normconvert
    normconvert.convert("path/to/llama", "path/to/output", "flashnorm")

Stages, in the order of the data: source, trace, plan, rewrite, verify. Importing this package
imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from normconvert.errors import (
    NormconvertError,
    PlanError,
    RewriteError,
    SourceError,
    TraceError,
    VerificationError,
)
from normconvert.registration import register

if TYPE_CHECKING:
    from normconvert.api import convert, inspect, verify_equivalence
    from normconvert.benchmark import bench
    from normconvert.ir.bench import Bench, BenchOptions
    from normconvert.ir.plan import Plan, Verdict
    from normconvert.ir.report import Conversion, Equivalence, Inspection
    from normconvert.publish import push

__version__ = "0.1.0"

__all__ = [
    "Bench",
    "BenchOptions",
    "Conversion",
    "Equivalence",
    "Inspection",
    "NormconvertError",
    "Plan",
    "PlanError",
    "RewriteError",
    "SourceError",
    "TraceError",
    "Verdict",
    "VerificationError",
    "__version__",
    "bench",
    "convert",
    "inspect",
    "push",
    "verify_equivalence",
]

_HOMES = {
    "convert": "normconvert.api",
    "inspect": "normconvert.api",
    "verify_equivalence": "normconvert.api",
    "bench": "normconvert.benchmark",
    "push": "normconvert.publish",
    "Bench": "normconvert.ir.bench",
    "BenchOptions": "normconvert.ir.bench",
    "Plan": "normconvert.ir.plan",
    "Verdict": "normconvert.ir.plan",
    "Conversion": "normconvert.ir.report",
    "Equivalence": "normconvert.ir.report",
    "Inspection": "normconvert.ir.report",
}


def __getattr__(name: str) -> object:
    """Load the stages only when they are used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


register()
