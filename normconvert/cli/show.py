"""Reports as text for people."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from normconvert.ir.plan import Verdict
from normconvert.ir.report import Comparison, Conversion, Equivalence, Inspection

_LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class _Group:
    """Norms that differ only in the number of their layer."""

    norm: str
    computes: str
    readers: str
    action: str
    reason: str


def show_inspection(report: Inspection) -> None:
    """The table of norms, the reasons of those that stay, the totals."""
    console = Console(highlight=False)
    plan = report.plan
    groups = _grouped(plan.verdicts)
    table = Table(title=f"{plan.model}: {report.model}", title_justify="left", expand=False)
    table.add_column("Norm", overflow="fold")
    table.add_column("", justify="right")
    table.add_column("Computes", overflow="fold")
    table.add_column("Read by", overflow="fold")
    table.add_column("FlashNorm")
    for group, count in groups.items():
        style = "green" if group.action == "fold" else "yellow"
        verdict = "folds" if group.action == "fold" else "stays"
        table.add_row(
            group.norm, f"×{count}", group.computes, group.readers, f"[{style}]{verdict}[/]"
        )
    console.print(table)
    for group in groups:
        if group.action == "keep":
            console.print(f"[yellow]{group.norm}[/] stays: {group.reason}.", soft_wrap=True)
    console.print(
        f"{len(plan.folded)} of {len(plan.verdicts)} norms fold: {report.changed_tensors} of "
        f"{report.total_tensors} tensors would change ({_size(report.changed_bytes)} of "
        f"{_size(report.total_bytes)}), {_size(report.gain_bytes)} of gains become 1"
        + (f", the output grows by {_size(report.added_bytes)}." if report.added_bytes else "."),
        soft_wrap=True,
    )
    if report.untied_bytes > report.added_bytes:
        console.print(f"With --tied untie the output would grow by {_size(report.untied_bytes)}.")
    _show_notes(console, plan.notes)


def show_conversion(report: Conversion) -> None:
    """What was done, and the verification's verdict."""
    console = Console(highlight=False)
    inspection, plan = report.inspection, report.inspection.plan
    if report.status == "unchanged":
        console.print(
            f"{inspection.model} is converted already: every gain that could fold is the "
            "identity. Nothing was written.",
            soft_wrap=True,
        )
        return
    if report.status == "planned":
        show_inspection(inspection)
        console.print("Dry run: nothing was written.")
        return
    console.print(
        f"Folded {len(plan.folded)} of {len(plan.verdicts)} norms: {inspection.changed_tensors} "
        f"tensors rewritten ({_size(inspection.changed_bytes)}).",
        soft_wrap=True,
    )
    for group in _grouped(plan.kept):
        console.print(f"[yellow]{group.norm}[/] stays: {group.reason}.", soft_wrap=True)
    _show_notes(console, plan.notes)
    if report.verification is not None:
        show_equivalence(report.verification)
    if report.status == "rejected":
        console.print("[red]The output is not equivalent; it was removed.[/]")
    else:
        console.print(f"Wrote {report.output}", soft_wrap=True)


def show_equivalence(report: Equivalence) -> None:
    """The verdict with the figures that it rests on."""
    console = Console(highlight=False)
    table = Table(title=f"Logits, computed in {report.dtype}", title_justify="left")
    table.add_column("")
    for comparison in report.comparisons:
        table.add_column(f"{comparison.tokens}, {comparison.positions} positions", justify="right")
    rows: tuple[tuple[str, Callable[[Comparison], str]], ...] = (
        ("largest difference", lambda c: f"{c.max:.2e}"),
        ("  noise floor", lambda c: f"{c.floor_max:.2e}"),
        ("RMS difference", lambda c: f"{c.rms:.2e}"),
        ("  noise floor", lambda c: f"{c.floor_rms:.2e}"),
        ("KL divergence", lambda c: f"{c.kl:.2e}"),
        ("same top token", lambda c: f"{c.top1:.2%}"),
    )
    for name, cell in rows:
        table.add_row(name, *(cell(comparison) for comparison in report.comparisons))
    console.print(table)
    _show_notes(console, report.notes)
    verdict = "[green]Equivalent[/]" if report.equivalent else "[red]Not equivalent[/]"
    console.print(f"{verdict}: {_why(report)}", soft_wrap=True)


def _why(report: Equivalence) -> str:
    if any(math.isnan(comparison.max) for comparison in report.comparisons):
        return "some of the logits are not numbers."
    worst = max(report.comparisons, key=_times_floor)
    if not report.differing_tensors:
        return "no tensor differs, and the logits " + (
            "are the same." if report.equivalent else "differ: config.json must differ."
        )
    return (
        f"the logits differ by {_times_floor(worst):.2g} times the noise floor (up to 4 is "
        f"equivalent), which is what rounding the {report.differing_tensors} differing tensors "
        "does to the original."
    )


def _times_floor(comparison: Comparison) -> float:
    pairs = ((comparison.max, comparison.floor_max), (comparison.rms, comparison.floor_rms))
    return max(
        found / floor if floor else float(found > 0) * float("inf") for found, floor in pairs
    )


def _grouped(verdicts: Iterable[Verdict]) -> dict[_Group, int]:
    groups: dict[_Group, int] = {}
    for verdict in verdicts:
        group = _Group(
            norm=_LAYER.sub("*", verdict.norm),
            computes=_formula(verdict),
            readers=", ".join(dict.fromkeys(_short(reader) for reader in verdict.readers)) or "-",
            action=verdict.action,
            reason=_LAYER.sub("*", verdict.reason),
        )
        groups[group] = groups.get(group, 0) + 1
    return groups


def _formula(verdict: Verdict) -> str:
    if verdict.kind == "unrecognised":
        return "unknown"
    name = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[verdict.kind]
    if verdict.gain:
        name += " · (1 + w)" if verdict.offset else " · w"
    return name + (" + b" if verdict.bias else "") + f", eps {verdict.eps:g}"


def _short(tensor: str) -> str:
    """The last two parts of a tensor's name that say something: q_proj, experts.gate_up_proj."""
    parts = [part for part in tensor.split(".") if not part.isdigit()]
    return parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]


def _size(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _show_notes(console: Console, notes: Iterable[str]) -> None:
    for note in notes:
        console.print(f"Note: {note}", soft_wrap=True)
