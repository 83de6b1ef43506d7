"""Trace: a checkpoint's model runs once on fake tensors, and every operation becomes a node."""

from normconvert.trace.live import trace_model
from normconvert.trace.tracer import trace

__all__ = ["trace", "trace_model"]
