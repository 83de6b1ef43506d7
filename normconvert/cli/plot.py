"""A bench report as one picture."""

from __future__ import annotations

import os
import textwrap
from typing import TYPE_CHECKING, Any

from normconvert.cli.show_bench import claim_line, setting, title, tokens
from normconvert.errors import BenchError
from normconvert.ir.bench import CONVERTED

if TYPE_CHECKING:
    from pathlib import Path

    from normconvert.ir.bench import Bench, Measurement, Timing

_FORMATS = (".png", ".svg", ".pdf")
_ONE_ROW, _MANY_ROWS, _GREY = "#9ecae1", "#2171b5", "#bdbdbd"
_COLOURS = {CONVERTED: "#238b45", "as_rmsnorm": "#238b45", "as_crmsnorm": "#74c476"}
_INCHES_PER_BAR = 0.24
_LONGEST = 1.5  # times the median


def check_plot(path: Path) -> None:
    """Refuse what cannot be drawn, before anything is measured.

    Raises:
        BenchError: matplotlib is missing, or `path` is no place for a picture.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BenchError(
            "--plot needs matplotlib, which is not installed: pip install 'normconvert[plot]'."
        ) from error
    if path.suffix not in _FORMATS:
        raise BenchError(f"{path} is no name for a picture; end it in {', '.join(_FORMATS)}.")
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise BenchError(f"{path} cannot be written: its folder does not exist or is read-only.")


def draw(report: Bench, path: Path) -> None:
    """Write the picture: the norms on the left, whole models on the right, the claims below."""
    from matplotlib.figure import Figure

    norms = [each for each in report.measurements if each.task in ("norm", "norm and linear")]
    models = [each for each in report.measurements if each not in norms and each.timings]
    bars = max(2 * len(_kinds(norms)), sum(len(each.timings) for each in models))
    figure: Any = Figure(figsize=(13, 2.5 + _INCHES_PER_BAR * bars), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
    left, right = figure.subplots(1, 2)
    heading = f"What converting {report.model} buys: medians and quartiles"
    figure.suptitle(f"{heading}\n{setting(report)}", x=0.01, ha="left")
    _draw_norms(left, norms, report.hidden_size)
    _draw_models(right, models, report)
    claims = (textwrap.fill(claim_line(each), 165) for each in report.claims)
    figure.supxlabel("\n".join(claims), x=0.01, ha="left", size=9)
    figure.savefig(path)


def _draw_norms(axes: Any, measurements: list[Measurement], hidden_size: int) -> None:
    """Two bars for each kind of norm: on one row and on many."""
    kinds = _kinds(measurements)
    counts = sorted(each.tokens or 0 for each in measurements)
    for each in measurements:
        many = each.tokens == counts[-1]
        colour = _MANY_ROWS if many else _ONE_ROW
        for timing in each.timings[1:]:
            _bar(axes, kinds.index(timing.name) + (0.2 if many else -0.2), timing, colour)
    heading = f"A norm alone, hidden size {hidden_size}: times as fast as LayerNorm"
    _finish(axes, f"{heading}\n(light: 1 row, dark: {counts[-1]} rows)", room=0.15)
    baselines = {t.name: each.timings[0].name for each in measurements for t in each.timings}
    behind = {kind: f"\n(than {base})" for kind, base in baselines.items() if base != "LayerNorm"}
    axes.set_yticks(range(len(kinds)), [kind + behind.get(kind, "") for kind in kinds])


def _draw_models(axes: Any, measurements: list[Measurement], report: Bench) -> None:
    """A bar for each contestant but the original, grouped by what they did."""
    place, middles = 0.0, []
    for each in measurements:
        first = place
        for timing in each.timings[1:]:
            share = report.share(each) if timing.name == CONVERTED else None
            gain = "" if share is None else f", {share:.0%} of the gain"
            colour = _COLOURS.get(timing.name, _GREY)
            _bar(axes, place, timing, colour, f"{timing.name}{gain}")
            place += 0.5
        middles.append((first + place - 0.5) / 2)
        place += 0.4
    ceiling = f"ceiling: the original without its {report.norms} norms"
    _finish(axes, f"Whole models: times as fast as the original\n({ceiling})", room=0.55)
    axes.set_yticks(middles, [f"{title(each)}\n{tokens(each)}" for each in measurements])


def _bar(axes: Any, place: float, timing: Timing, colour: str, what: str = "") -> None:
    """From 1 to the median, with a line from quartile to quartile and the number behind it.

    A line that would make all others short is cut off.
    """
    speed = timing.speedup
    upper = min(speed.upper, _LONGEST * speed.median)
    axes.barh(place, speed.median - 1, left=1, height=0.4, color=colour)
    axes.plot([speed.lower, upper], [place, place], color="black", linewidth=1)
    axes.annotate(
        f"{speed.median:.2f} {what}".strip(),
        (max(1, upper), place),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        size=8,
    )


def _finish(axes: Any, heading: str, *, room: float) -> None:
    """The title and the axes, with `room` for the texts, as a share of the width."""
    low, high = axes.dataLim.intervalx
    axes.set_xlim(max(0, low - 0.05 * (high - low)), high + room * (high - low))
    axes.set_title(heading, loc="left", size=10)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("slower   ←   1   →   faster")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _kinds(measurements: list[Measurement]) -> list[str]:
    """The names of what was compared with something, in their order."""
    return list(dict.fromkeys(t.name for each in measurements for t in each.timings[1:]))
