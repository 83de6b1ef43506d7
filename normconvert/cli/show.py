"""Reports as text for people, and as JSON."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from normconvert.cli.amounts import duration as _duration
from normconvert.cli.amounts import size as _size
from normconvert.cli.verdict import certified, parting, rows, why
from normconvert.ir.plan import IDENTITY, Plan, Verdict
from normconvert.ir.report import (
    Algebra,
    Certificate,
    Conversion,
    Cost,
    Equivalence,
    Generation,
    Inspection,
)


class Stdout(Console):
    """Standard output. That its reader has left, as `head` does, changes nothing that was done."""

    def on_broken_pipe(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_NOT_VERIFIED = "Not verified: no certificate was made, and no logits were compared."
_SPEED_ELSEWHERE = "inspect --disk-speed"  # which is no option of the converting commands
_LAYER = re.compile(r"(?<=\.)\d+\b")


@dataclass(frozen=True, slots=True)
class _Group:
    """Norms that differ only in the number of their layer."""

    norm: str
    computes: str
    readers: str
    action: str
    reason: str
    becomes: bool


def show_inspection(report: Inspection, *, option: str = "--disk-speed") -> None:
    """The table of norms, the reasons of those that stay, the totals; `option` sets the speed."""
    console = Stdout(highlight=False, emoji=False)
    plan = report.plan
    becomes = (
        {v.norm: v for v in report.rmsnorm.verdicts if v.rule == "rmsnorm"}
        if report.rmsnorm
        else {}
    )
    groups = _grouped(plan.verdicts, becomes)
    converts = "converted" if "rmsnorm" in report.done else "converts"
    table = Table(title=escape(f"{plan.model}: {report.model}"), title_justify="left", expand=False)
    table.add_column("Norm", overflow="fold")
    table.add_column("", justify="right")
    table.add_column("Computes", overflow="fold")
    table.add_column("Read by", overflow="fold")
    table.add_column("FlashNorm")
    if becomes:
        table.add_column("RMSNorm")
    for group, count in groups.items():
        cells = [group.norm, f"×{count}", group.computes, group.readers]
        cells += [_folding(group)]
        cells += [_verdict(group.becomes, converts)] if becomes else []
        table.add_row(*cells)
    console.print(table)
    for group in groups:
        if group.action == "keep" and group.reason != IDENTITY:
            console.print(f"[yellow]{group.norm}[/] stays: {group.reason}.", soft_wrap=True)
    for group in _grouped(v for v in becomes.values() if v.action == "keep"):
        console.print(f"[yellow]{group.norm}[/] stays what it is: {group.reason}.", soft_wrap=True)
    if report.done and not plan.edits:
        rules = ", ".join(report.done)
        console.print(f"Converted already ({rules}): the same again would change nothing.")
        return
    console.print(
        f"{len(plan.folded)} of {len(plan.verdicts)} norms fold: {report.changed_tensors} of "
        f"{report.total_tensors} tensors would change ({_size(report.changed_bytes)} of "
        f"{_size(report.total_bytes)}), {_size(report.gain_bytes)} of gains become 1"
        + (f", the output grows by {_size(report.added_bytes)}." if report.added_bytes else "."),
        soft_wrap=True,
    )
    _show_cost(console, report.cost, "Folding", option)
    if report.untied_bytes > report.added_bytes:
        console.print(f"With --tied untie the output would grow by {_size(report.untied_bytes)}.")
    if report.rmsnorm is not None:
        _show_layer_norms(console, report.rmsnorm)
    _show_unknown(console, plan, report.rmsnorm)
    _show_notes(console, plan.notes)


def _show_cost(console: Console, cost: Cost, what: str, option: str) -> None:
    if not cost.written_bytes:  # there is nothing to do
        return
    moving = (cost.read_bytes + cost.written_bytes) / cost.disk_speed
    starting = ", most of it the start of the program" if moving < cost.seconds / 2 else ""
    console.print(
        f"{what} would read {_size(cost.read_bytes)}, write {_size(cost.written_bytes)} and take "
        f"{_size(cost.peak_bytes)} of memory; on a disk of {_size(cost.disk_speed)}/s "
        f"({option}) that is about {_duration(cost.seconds)}{starting}, without the "
        "verification.",
        soft_wrap=True,
    )


def _show_layer_norms(console: Console, plan: Plan) -> None:
    converted, native = plan.changed("rmsnorm"), plan.native
    layer_norms = [v for v in plan.verdicts if v.rule == "rmsnorm" and v.kind == "layernorm"]
    line = f"{len(converted)} of {len(layer_norms)} LayerNorms convert to RMSNorm"
    if native is not None and native.recenterings:
        places = ", ".join(f"the {each.at} of {each.module}" for each in native.recenterings)
        line += f", with {places} recentered"
    console.print(line + ".", soft_wrap=True)


def _show_unknown(console: Console, *plans: Plan | None) -> None:
    """How many norms stay for want of knowledge, so that no new release loses any in silence."""
    count = len({verdict.norm for plan in plans if plan for verdict in plan.unknown})
    if count:
        norms = "1 norm stays" if count == 1 else f"{count} norms stay"
        console.print(
            f"[yellow]{norms}[/] because normconvert does not know an operation or a structure "
            "around it.",
            soft_wrap=True,
        )


def _folding(group: _Group) -> str:
    """A gain that is 1 in what was converted has been folded: no other is looked at."""
    if group.reason == IDENTITY:
        return "[green]folded[/]"
    return _verdict(group.action != "keep", "folds")


def _verdict(changes: bool, word: str) -> str:
    return f"[green]{word}[/]" if changes else "[yellow]stays[/]"


def show_conversion(report: Conversion) -> None:
    """What was done, and the verification's verdict."""
    console = Stdout(highlight=False, emoji=False)
    inspection, plan = report.inspection, report.inspection.plan
    if report.status == "unchanged":
        console.print(
            f"{escape(inspection.model)} is converted already: every gain that could fold is the "
            "identity. Nothing was written."
            if plan.native is None and "rmsnorm" not in plan.rules
            else f"{escape(inspection.model)} is converted already. Nothing was written.",
            soft_wrap=True,
        )
        return
    if report.status == "planned" and plan.rules == ("flashnorm",):
        show_inspection(inspection, option=_SPEED_ELSEWHERE)
        console.print("Dry run: nothing was written.")
        return
    rewritten = (
        f"{inspection.changed_tensors} tensors rewritten ({_size(inspection.changed_bytes)})"
    )
    if plan.omitted:
        rewritten += f", {len(plan.omitted)} left out ({_size(inspection.omitted_bytes)})"
    if inspection.added_bytes > 0:
        rewritten += f", {_size(inspection.added_bytes)} larger"
    done = f"{_done(plan)}: {rewritten}."
    planned = report.status == "planned"
    console.print(f"Planned: {done}" if planned else done[:1].upper() + done[1:], soft_wrap=True)
    if plan.native is not None:
        for each in plan.native.recenterings:
            how = "Compressed" if each.compress else "Recentered"
            console.print(f"{how}: the {each.at} of {each.module}.", soft_wrap=True)
    kept = [v for v in plan.kept("rmsnorm") if v.kind == "layernorm"]
    for group in _grouped((*kept, *plan.kept("prmsnorm"))):
        console.print(f"[yellow]{group.norm}[/] stays: {group.reason}.", soft_wrap=True)
    for group in _grouped([v for v in plan.folded if "bias / gain stays" in v.reason]):
        left = "is left with a bias (its own / its gain): what reads it has none to add it to"
        console.print(f"[yellow]{group.norm}[/] {left}.", soft_wrap=True)
    what = "stays" if plan.rules == ("flashnorm",) else "keeps its gain"
    unfolded = [v for v in plan.kept("flashnorm") if v.gain is not None or what == "stays"]
    for group in _grouped(unfolded):
        console.print(f"[yellow]{group.norm}[/] {what}: {group.reason}.", soft_wrap=True)
    _show_unknown(console, plan)
    _show_notes(console, plan.notes)
    if planned:
        _show_cost(console, inspection.cost, "Converting", _SPEED_ELSEWHERE)
        console.print("Dry run: nothing was written.")
        return
    if (count := report.kept_shards) is not None:
        shards = {0: "no shard", 1: "1 shard"}.get(count, f"{count} shards")
        console.print(f"Resumed: {shards} of an earlier run stayed.")
    if report.verification is None:
        console.print(_NOT_VERIFIED, soft_wrap=True)
    else:
        show_equivalence(report.verification)
        if plan.changed("prmsnorm"):
            console.print("A pRMSNorm is an approximation: this is how far it moves the model.")
    if report.status == "rejected":
        console.print("[red]The output is not equivalent; it was removed.[/]")
    elif report.output is not None:
        console.print(f"Wrote {escape(str(report.output))}", soft_wrap=True)


def _done(plan: Plan) -> str:
    """How many norms each rule changed; the last of the two for LayerNorms says it all."""
    parts = []
    norms = "{} of {} LayerNorms"
    made = f"made {norms} {{}}s" if plan.native else f"centered what {norms} read"
    for rule, words in (
        ("crmsnorm" if "crmsnorm" in plan.rules else "rmsnorm", made),
        ("flashnorm", "folded {} of {} norms"),
        ("prmsnorm", "made {} of {} norms pRMSNorms"),
    ):
        if rule in plan.rules:
            asked = [v for v in plan.verdicts if v.rule == rule]
            if rule in ("rmsnorm", "crmsnorm"):
                asked = [v for v in asked if v.kind == "layernorm"]
            if not asked and len(plan.rules) > 1:
                continue
            name = {"rmsnorm": "RMSNorm", "crmsnorm": "CRMSNorm"}.get(rule)
            parts.append(words.format(len(plan.changed(rule)), len(asked), name))
    return ", ".join(parts)


def show_equivalence(report: Equivalence) -> None:
    """The verdict with the figures that it rests on."""
    console = Stdout(highlight=False, emoji=False)
    if report.certificate is not None:
        _show_certificate(console, report.certificate)
    if report.algebra is not None:
        _show_algebra(console, report.algebra)
    if not report.comparisons:
        _show_notes(console, report.notes)
        return
    table = Table(title=f"Logits, computed in {report.dtype}", title_justify="left")
    table.add_column("")
    for comparison in report.comparisons:
        table.add_column(comparison.tokens, justify="right")
    for name, cells in rows(report.comparisons):
        table.add_row(name, *cells)
    console.print(table)
    if report.generation is not None:
        _show_generation(console, report.generation)
    _show_notes(console, report.notes)
    verdict = "[green]Equivalent[/]" if report.equivalent else "[red]Not equivalent[/]"
    console.print(f"{verdict}: {why(report)}", soft_wrap=True)
    if (sentence := parting(report)) is not None:
        console.print(escape(sentence), soft_wrap=True)


def _show_generation(console: Console, generation: Generation) -> None:
    prompt, original, converted = (
        escape(repr(text))
        for text in (generation.prompt, generation.original, generation.converted)
    )
    if generation.same == generation.tokens:
        line = f"After {prompt} both write {original}."
    else:
        line = (
            f"After {prompt} the original writes {original}, the converted model {converted}: the "
            f"first {generation.same} of {generation.tokens} tokens are the same."
        )
    console.print(line, soft_wrap=True)


def _show_certificate(console: Console, certificate: Certificate) -> None:
    if certificate.valid:
        console.print(f"Certificate: {certified(certificate)}", soft_wrap=True)
        return
    count = certificate.problem_count
    what = "one thing is" if count == 1 else f"{count} things are"
    console.print(f"[red]No certificate[/]: {what} not as the plan says.", soft_wrap=True)
    for problem in certificate.problems:
        console.print(f"  [red]{escape(problem.place)}[/]: {escape(problem.what)}", soft_wrap=True)
    if count > len(certificate.problems):
        console.print(f"  and {count - len(certificate.problems)} more")


def _show_algebra(console: Console, algebra: Algebra) -> None:
    if not algebra.sites:
        return
    worst = max(algebra.sites, key=lambda site: site.error)
    line = (
        f"Algebra: what reads the {len(algebra.sites)} rewritten norms differs by at most "
        f"{worst.error:.1e} before rounding"
    )
    if algebra.valid:
        console.print(f"{line}.", soft_wrap=True)
    else:
        first = next(site for site in algebra.sites if site.error > algebra.tolerance)
        console.print(
            f"[red]{line}[/], more than {algebra.tolerance:.0e}: first at {escape(first.norm)}, "
            f"read by {escape(', '.join(first.readers))}.",
            soft_wrap=True,
        )


def _grouped(
    verdicts: Iterable[Verdict], becomes: Mapping[str, Verdict] | None = None
) -> dict[_Group, int]:
    groups: dict[_Group, int] = {}
    for verdict in verdicts:
        group = _Group(
            norm=escape(_LAYER.sub("*", verdict.norm)),
            computes=_formula(verdict),
            readers=", ".join(dict.fromkeys(_short(reader) for reader in verdict.readers)) or "-",
            action=verdict.action,
            reason=escape(_LAYER.sub("*", verdict.reason)),
            becomes=becomes is not None
            and verdict.norm in becomes
            and becomes[verdict.norm].action != "keep",
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


def _show_notes(console: Console, notes: Iterable[str]) -> None:
    for note in notes:
        console.print(escape(f"Note: {note}"), soft_wrap=True)


def show_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    Stdout(soft_wrap=True).out(to_text(document), highlight=False)


def to_text(document: dict[str, Any]) -> str:
    """JSON, which has no word for NaN and infinity: null."""
    plain = json.dumps(document)
    return json.dumps(json.loads(plain, parse_constant=lambda _: None), indent=1, allow_nan=False)
