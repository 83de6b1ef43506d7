"""A verification as one self-contained page: no script, nothing from the network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from normconvert.cli.verdict import certified, parting, rows, why
from normconvert.ir.report import Comparison, Equivalence, Generation, Layer

_STYLE = """
:root { color-scheme: light dark; --good: #1a7f37; --bad: #cf222e; --dim: #6e7781; --bar: #0969da; }
@media (prefers-color-scheme: dark) { :root { --good: #3fb950; --bad: #f85149; --bar: #58a6ff; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin-top: 2rem }
.good { color: var(--good) } .bad { color: var(--bad) } .dim { color: var(--dim) }
table { border-collapse: collapse; font-size: .9rem } th { text-align: left; font-weight: 600 }
td, th { padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #8883; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
th.row { white-space: pre }
code { font-size: .9em; overflow-wrap: anywhere } svg { width: 100%; height: auto }
svg text { font: 11px system-ui, sans-serif; fill: currentColor }
"""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 220, 56, 24


def page(report: Equivalence) -> str:
    """The whole HTML document of a verification."""
    good = report.equivalent
    verdict = "Equivalent" if good else "Not equivalent"
    parts = [
        f"<h1 class='{'good' if good else 'bad'}'>{verdict}</h1>",
        f"<p><code>{escape(report.original)}</code> and <code>{escape(report.converted)}</code>, "
        f"computed in {report.dtype}</p>",
        f"<p>{verdict}: {escape(why(report))}</p>" if report.comparisons else "",
        f"<p class='bad'>{escape(sentence)}</p>" if (sentence := parting(report)) else "",
        _certificate(report),
        _algebra(report),
        "<h2>Logits</h2>",
        _comparisons(report.comparisons),
        _generation(report.generation),
        *(f"<p class='dim'>{escape(note)}</p>" for note in report.notes),
    ]
    if report.layers:
        parts += ["<h2>Error behind each layer, against the noise floor</h2>", _plot(report.layers)]
    for comparison in report.comparisons:
        if comparison.distribution:
            title = f"How far the logits differ: {escape(comparison.tokens)}"
            parts += [f"<h2>{title}</h2>", _histogram(comparison)]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>{verdict}: {escape(report.converted)}</title><style>{_STYLE}</style></head><body>"
        + "\n".join(part for part in parts if part)
        + "</body></html>\n"
    )


def _certificate(report: Equivalence) -> str:
    certificate = report.certificate
    if certificate is None:
        return "<h2>Certificate</h2><p>None: nothing says how this checkpoint was converted.</p>"
    if certificate.valid:
        return f"<h2 class='good'>Certificate: valid</h2><p>{certified(certificate)}</p>"
    rows = "".join(
        f"<tr><td><code>{escape(problem.place)}</code></td><td>{escape(problem.what)}</td></tr>"
        for problem in certificate.problems
    )
    count = certificate.problem_count
    return f"<h2 class='bad'>Certificate: refused ({count})</h2><table>{rows}</table>"


def _algebra(report: Equivalence) -> str:
    if report.algebra is None or not report.algebra.sites:
        return ""
    rows = "".join(
        f"<tr><td><code>{escape(site.norm)}</code></td>"
        f"<td><code>{escape(', '.join(site.readers))}</code></td>"
        f"<td class='number {'good' if site.error <= report.algebra.tolerance else 'bad'}'>"
        f"{site.error:.1e}</td></tr>"
        for site in report.algebra.sites
    )
    return (
        f"<h2>The norms, before rounding (up to {report.algebra.tolerance:.0e})</h2><details open>"
        f"<summary>{len(report.algebra.sites)} rewritten norms</summary><table>"
        f"<tr><th>Norm</th><th>Read by</th><th>Error</th></tr>{rows}</table></details>"
    )


def _comparisons(comparisons: Sequence[Comparison]) -> str:
    head = "".join(f"<th>{escape(each.tokens)}</th>" for each in comparisons)
    body = "".join(
        f"<tr><th class='row'>{name}</th>"
        + "".join(f"<td class='number'>{cell}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows(comparisons)
    )
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _generation(generation: Generation | None) -> str:
    if generation is None:
        return ""
    rows = "".join(
        f"<tr><th>{name}</th><td><code class='dim'>{escape(repr(generation.prompt)[1:-1])}</code>"
        f"<code>{escape(repr(text)[1:-1])}</code></td></tr>"
        for name, text in (("original", generation.original), ("converted", generation.converted))
    )
    count = "all" if generation.same == generation.tokens else f"the first {generation.same}"
    return (
        f"<h2>What they write: {count} of {generation.tokens} tokens are the same</h2>"
        f"<table>{rows}</table>"
    )


def _plot(layers: Sequence[Layer]) -> str:
    """Two lines over the layers on a logarithmic scale; what is 0 lies on the bottom."""
    values = [value for layer in layers for value in (layer.rms, layer.floor) if value > 0]
    low, high = _decades(values)
    step = (_WIDTH - _LEFT - 10) / max(1, len(layers) - 1)

    def line(points: list[float], style: str) -> str:
        places = " ".join(
            f"{_LEFT + i * step:.1f},{_y(value, low, high):.1f}" for i, value in enumerate(points)
        )
        return f"<polyline points='{places}' fill='none' {style}/>"

    return (
        _figure(
            low,
            high,
            line(
                [layer.floor for layer in layers],
                "stroke='#8889' stroke-width='2' stroke-dasharray='5 4'",
            )
            + line([layer.rms for layer in layers], "stroke='var(--bar)' stroke-width='2'")
            + f"<text x='{_LEFT}' y='{_HEIGHT - 6}'>{escape(layers[0].module)}</text>"
            + f"<text x='{_WIDTH - 10}' y='{_HEIGHT - 6}' text-anchor='end'>"
            f"{escape(layers[-1].module)}</text>",
        )
        + "<p class='dim'>Solid: RMS difference of the states. Dashed: noise floor.</p>"
    )


def _histogram(comparison: Comparison) -> str:
    """A bar for every power of ten."""
    counts = dict(comparison.distribution)
    first, last = min(counts), max(counts)
    width = min(48.0, (_WIDTH - 20) / (last - first + 1))
    largest = max(counts.values())
    bars = ""
    for i, power in enumerate(range(first, last + 1)):
        count = counts.get(power, 0)
        height = (_HEIGHT - 2 * _BOTTOM) * count / largest
        x, top = 10 + i * width, _HEIGHT - _BOTTOM - height
        bars += (
            f"<rect x='{x + 2:.1f}' y='{top:.1f}' width='{width - 4:.1f}' height='{height:.1f}' "
            f"fill='var(--bar)'><title>{count} logits</title></rect>"
            f"<text x='{x + width / 2:.1f}' y='{_HEIGHT - 8}' text-anchor='middle'>1e{power}</text>"
        )
    return f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img'>{bars}</svg>"


def _decades(values: Sequence[float]) -> tuple[int, int]:
    finite = [value for value in values if math.isfinite(value)] or [1.0]
    return math.floor(math.log10(min(finite))) - 1, math.ceil(math.log10(max(finite))) + 1


def _y(value: float, low: int, high: int) -> float:
    power = max(low, min(high, math.log10(value))) if value > 0 else low
    return 10 + (_HEIGHT - _BOTTOM - 16) * (high - power) / (high - low)


def _figure(low: int, high: int, content: str) -> str:
    grid = ""
    for power in range(low, high + 1, max(1, (high - low) // 6)):
        y = _y(10.0**power, low, high)
        grid += (
            f"<line x1='{_LEFT}' x2='{_WIDTH - 10}' y1='{y:.1f}' y2='{y:.1f}' stroke='#8883'/>"
            f"<text x='{_LEFT - 8}' y='{y + 4:.1f}' text-anchor='end'>1e{power}</text>"
        )
    return f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img'>{grid}{content}</svg>"
