"""Retarget: a centered checkpoint becomes one of another architecture, proved by tracing both."""

from normconvert.retarget.twin import retarget

__all__ = ["retarget"]
