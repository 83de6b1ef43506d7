"""A bench report as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from normconvert.cli.show import Stdout
from normconvert.ir.bench import CONVERTED

if TYPE_CHECKING:
    from normconvert.ir.bench import Bench, Claim, Measurement, Quartiles

_NO_SHARE = (
    "No share is given where in a quarter of the rounds the ceiling was no faster, or where the "
    "rounds differ by more than it gains: there is no gain for sure."
)


def show_bench(report: Bench) -> None:
    """What was measured, in the order in which it was, and the papers' claims beside it."""
    console = Stdout(highlight=False, emoji=False)
    console.print(f"{escape(report.model)} in {setting(report)}", soft_wrap=True)
    rules = f" ({', '.join(report.rules)})" if report.rules else ""
    made = "made for this, not verified, and removed"
    console.print(f"Converted{rules}: {escape(report.converted or made)}", soft_wrap=True)
    console.print(_norms(report))
    console.print(_models(report))
    shares = [report.share(each) for each in report.measurements if each.timing(CONVERTED)]
    if None in shares and not report.busy:
        console.print(_NO_SHARE, soft_wrap=True)
    for each in report.measurements:
        if each.note is not None:
            console.print(f"[yellow]{title(each)}[/]: {escape(each.note)}", soft_wrap=True)
    for note in report.notes:
        console.print(f"Note: {escape(note)}", soft_wrap=True)
    for claim in report.claims:
        console.print(claim_line(claim), soft_wrap=True)


def setting(report: Bench) -> str:
    """In what, on what and with what it was measured."""
    threads = "1 thread" if report.threads == 1 else f"{report.threads} threads"
    return (
        f"{report.dtype}, on {report.device} ({report.processor}, {threads}), "
        f"torch {report.torch}, transformers {report.transformers}"
    )


def title(measurement: Measurement) -> str:
    """The name of a task of whole models."""
    name = "training step" if measurement.task == "training" else measurement.task
    return f"{name}, compiled" if measurement.compiled else name


def tokens(measurement: Measurement) -> str:
    """How many tokens a task of whole models is about."""
    if measurement.tokens is None:
        return "1 input"
    if measurement.task == "decode":
        return f"1 token after {measurement.tokens}"
    return f"{measurement.tokens} tokens"


def claim_line(claim: Claim) -> str:
    """What a paper says, and what was measured here, in a line."""
    here = [f"{each.what}: {_saved(each.saved)}" for each in claim.measured]
    if claim.left_out:
        say = "measurement says" if claim.left_out == 1 else "measurements say"
        here.append(f"{claim.left_out} {say} nothing about it")
    return (
        f"{claim.paper} (arXiv {claim.arxiv}): models take {claim.lower:.0%} to {claim.upper:.0%} "
        "less time than with LayerNorm. "
        f"Here: {'; '.join(here) or 'no LayerNorm became an RMSNorm'}."
    )


def _saved(share: float) -> str:
    return f"{abs(share):.0%} {'less' if share >= 0 else 'more'}"


def _norms(report: Bench) -> Table:
    """A row for each kind of norm, two columns for each number of rows that it was given."""
    heading = f"A norm alone: hidden size {report.hidden_size}, times as fast as the first one"
    table = Table(title=heading, title_justify="left")
    table.add_column("")
    alone, linear = (
        [each for each in report.measurements if each.task == task]
        for task in ("norm", "norm and linear")
    )
    for each in alone:
        rows = "1 row" if each.tokens == 1 else f"{each.tokens} rows"
        table.add_column(f"{rows}\nµs", justify="right")
        table.add_column("\ntimes as fast", justify="right")
    for measurements in (alone, linear):
        for timings in zip(*(each.timings for each in measurements), strict=True):
            pairs = ((_number(t.seconds.median * 1e6), _speed(t.speedup)) for t in timings)
            table.add_row(timings[0].name, *(cell for pair in pairs for cell in pair))
        table.add_section()
    return table


def _models(report: Bench) -> Table:
    heading = f"Whole models: the ceiling is the original without its {report.norms} norms"
    table = Table(title=heading, title_justify="left")
    for name in ("", "ms", "times as fast", "share of the ceiling's gain"):
        table.add_column(name, justify="right" if name else "left")
    for each in report.measurements:
        if each.task in ("norm", "norm and linear"):
            continue
        missing = () if each.timings else ("", "not measured")
        table.add_row(f"[bold]{title(each)}[/]: {tokens(each)}", *missing)
        for timing in each.timings:
            share = report.share(each) if timing.name == CONVERTED else None
            low, median, high = (
                _number(value * 1e3)
                for value in (timing.seconds.lower, timing.seconds.median, timing.seconds.upper)
            )
            cells = f"{median} [dim]{low}–{high}[/]", _speed(timing.speedup)
            table.add_row(f"  {timing.name}", *cells, "" if share is None else f"{share:.0%}")
        table.add_section()
    return table


def _speed(speedup: Quartiles) -> str:
    """The median and the quartiles, but for the one that the others are compared with."""
    if speedup.lower == speedup.upper == 1:
        return "1" + 10 * " "
    return f"{speedup.median:.2f} [dim]{speedup.lower:.2f}–{speedup.upper:.2f}[/]"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"
