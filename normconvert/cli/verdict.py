"""What a terminal and an HTML page say of a verification, in the same words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from normconvert.ir.report import Certificate, Comparison, Equivalence


def rows(comparisons: Sequence[Comparison]) -> list[tuple[str, list[str]]]:
    """What each row says, and its cells: one for each comparison."""
    found = [
        ("positions", [f"{each.positions:,}" for each in comparisons]),
        ("largest difference", [f"{each.max:.2e}" for each in comparisons]),
        ("  noise floor", [f"{each.floor_max:.2e}" for each in comparisons]),
        ("RMS difference", [f"{each.rms:.2e}" for each in comparisons]),
        ("  noise floor", [f"{each.floor_rms:.2e}" for each in comparisons]),
        ("KL divergence", [f"{each.kl:.2e}" for each in comparisons]),
        ("same top token", [f"{each.top1:.2%}" for each in comparisons]),
    ]
    if any(each.perplexity for each in comparisons):
        found += [
            ("perplexity, original", [_perplexity(each, 0) for each in comparisons]),
            ("  converted", [_perplexity(each, 1) for each in comparisons]),
        ]
    return found


def _perplexity(comparison: Comparison, which: int) -> str:
    return f"{comparison.perplexity[which]:.4g}" if comparison.perplexity else ""


def certified(certificate: Certificate) -> str:
    """What a valid certificate says, in a sentence or two."""
    are = "tensor is" if certificate.rewritten == 1 else "tensors are"
    files = "1 file" if certificate.files == 1 else f"{certificate.files} files"
    line = f"{certificate.copied} tensors and {files} are the original's, byte for byte."
    if certificate.rewritten:
        made = "exactly what the plan makes of the original, rounded once"
        line = f"{certificate.rewritten} {are} {made}; {line}"
    if certificate.undecided:
        line += f" ({certificate.undecided} elements lie too near to a tie to tell.)"
    return line


def why(report: Equivalence) -> str:
    """What the verdict rests on, as the end of a sentence."""
    if any(math.isnan(comparison.floor_max) for comparison in report.comparisons):
        return (
            "some of the original's logits are not numbers, so nothing can be compared with them."
        )
    if any(math.isnan(comparison.max) for comparison in report.comparisons):
        return "some of the logits are not numbers."
    if report.certificate is not None and not report.certificate.valid:
        return "the converted checkpoint is not what its plan makes of the original."
    if report.algebra is not None and not report.algebra.valid:
        return "a rewritten norm and what reads it compute something else before rounding."
    times = max(_times_floor(comparison) for comparison in report.comparisons)
    several = report.differing_tensors > 1
    tensors = f"{report.differing_tensors} differing tensors" if several else "differing tensor"
    if not report.equivalent and all(each.equivalent for each in report.comparisons):
        if report.differing_tensors and not times:
            return f"the {tensors} moved no bit of the logits, so nothing is known of what they do."
        return "the logits are equivalent, but the tokenizers read text in different ways."
    if report.differing_tensors:
        floor = f"rounding the {tensors} does to the original"
    elif times:
        floor = "computing in another order does, for no tensor differs"
    else:
        return "no tensor differs, and the logits are the same."
    return (
        f"the logits differ by {times:.2g} times the noise floor (up to 4 is equivalent), "
        f"which is what {floor}."
    )


def parting(report: Equivalence) -> str | None:
    """The first layer at which they are further apart than rounding explains, in a sentence."""
    if report.parts_at is None:
        return None
    layer = next(layer for layer in report.layers if layer.module == report.parts_at)
    return (
        f"The two part at {layer.module}: behind it their states differ by {layer.rms:.1e} (RMS; "
        f"the noise floor is {layer.floor:.1e})."
    )


def _times_floor(comparison: Comparison) -> float:
    pairs = ((comparison.max, comparison.floor_max), (comparison.rms, comparison.floor_rms))
    return max(found / floor if floor else math.inf if found else 0.0 for found, floor in pairs)
