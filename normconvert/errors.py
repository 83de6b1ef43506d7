"""Everything that normconvert refuses, as exceptions with one clear sentence and a remedy."""

from __future__ import annotations


class NormconvertError(Exception):
    """Something is refused or wrong in the input; nothing was written.

    The message is one or two sentences that name the file or tensor and say what to do.
    ``code`` is a short stable word for machines (``--json`` prints it).
    """

    code = "error"


class SourceError(NormconvertError):
    """The checkpoint to read is missing, damaged or of a kind that is not supported."""

    code = "source"


class TraceError(NormconvertError):
    """The model's forward pass could not be traced, or does not fit the checkpoint.

    `module` is the path of the module that was running, if any was.
    """

    code = "trace"

    def __init__(self, message: str, *, module: str = "") -> None:
        super().__init__(message)
        self.module = module


class PlanError(NormconvertError):
    """No legal rewrite exists for what was asked."""

    code = "plan"


class RewriteError(NormconvertError):
    """The output could not be written, or a value does not fit its stored dtype."""

    code = "rewrite"


class VerificationError(NormconvertError):
    """The two models could not be compared."""

    code = "verify"


class BenchError(NormconvertError):
    """A model cannot be run here to be measured."""

    code = "bench"


def first_line(error: Exception) -> str:
    """The type and the first line of a foreign exception, to be part of a sentence of ours.

    With the second line if the first one announces it by a colon.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else ""
    return f"{type(error).__name__}: {said}".rstrip(" .:")
