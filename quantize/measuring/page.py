"""A report as one page: a file of its own that needs no network, in light and dark, on any screen.

The table, the two plots of cost against quality whose points tell their row, what each layer got
and why, the noise, the machine, and how to load the file. The plots are SVG; the script only shows
the row of the point under the pointer or the keyboard's focus, so without it nothing is missing
but that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from quantize.measuring.rows import MARKS, Report, Row, limits, not_beaten
from quantize.measuring.table import chosen_name, described, header_and_cells, legend

_WIDTH, _HEIGHT = 420, 300  # of a plot, in units of its own
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 16, 14, 40
_TICKS = 5


def page(report: Report) -> str:
    """The page as HTML.

    Args:
        report: of `build_report`. In `data`, "layers" (dicts of name, got, why) and "chosen" (a
            file's name) are shown in places of their own.

    Returns:
        The text of a file that links to nothing.
    """
    rows = report["rows"]
    data = report["data"]
    parts = {
        "title": escape(_title(report)),
        "reason": _paragraph(data.get("reason")),
        "table": _table(rows, data.get("chosen")),
        "legend": _list(legend(rows)),
        "plots": _plots(rows),
        "layers": _layers(data.get("layers") or ()),
        "load": escape(_how_to_load(rows, data)),
        "about": _list(described(report)),
    }
    template = resources.files("quantize.measuring").joinpath("page.html").read_text("utf-8")
    return Template(template).substitute(parts)


def _title(report: Report) -> str:
    name = chosen_name(report)
    return f"{name} and what it was chosen from" if name else "What each file costs"


def _paragraph(text: Any) -> str:
    return f"<p class=reason>{escape(str(text))}</p>" if text else ""


def _list(lines: Iterable[str]) -> str:
    items = [f"<li>{escape(line)}</li>" for line in lines]
    return f"<ul>{''.join(items)}</ul>"


# Tables.


def _table(rows: Sequence[Row], chosen: str | None) -> str:
    header, cells = header_and_cells(rows)
    lines = [_line(header, "th")]
    for number, (row, texts) in enumerate(zip(rows, cells, strict=True)):
        kinds = ["chosen"] if chosen is not None and row["file"] == chosen else []
        kinds += ["busy"] if "busy machine" in row["notes"] else []
        kinds += ["bad"] if row["notes"].startswith(MARKS) else []
        attributes = f' id="row{number}" class="{" ".join(kinds)}"'
        lines.append(_line(texts, "td", attributes))
    return f"<table>{''.join(lines)}</table>"


def _line(texts: Sequence[str], tag: str, attributes: str = "") -> str:
    cells = [f"<{tag}>{escape(text)}</{tag}>" for text in texts]
    return f"<tr{attributes}>{''.join(cells)}</tr>"


def _layers(layers: Iterable[Any]) -> str:
    known = list(layers)
    if not known:
        return ""
    lines = [_line(("layer", "got", "why"), "th")]
    lines += [_line((part["name"], part["got"], part["why"]), "td") for part in known]
    table = f"<table class=layers>{''.join(lines)}</table>"
    return f"<h2>Layers</h2><div class=wide>{table}</div>"


def _how_to_load(rows: Sequence[Row], data: Any) -> str:
    files = [row["file"] for row in rows if row["file"]]
    file = data.get("chosen") or (files[-1] if files else "model.pth")
    return (
        f"import quantize\n\nmodel = quantize.open_model({file!r})"
        f"  # of a class of yours: model=YourClass()"
    )


# Plots.


def _plots(rows: Sequence[Row]) -> str:
    shown = [(n, row) for n, row in enumerate(rows) if row["metric"]["value"] is not None]
    if not shown:
        return "<p>No metric was measured, so there is nothing to plot against.</p>"
    sizes = [(n, row, row["bytes"] / 1e6) for n, row in shown if row["bytes"] is not None]
    timed = [(n, row, row["latency_ms"]["median"]) for n, row in shown if row["latency_ms"]]
    return _plot(sizes, "file size, MB") + _plot(timed, "latency, ms")


def _plot(points: Sequence[tuple[int, Row, float]], label: str) -> str:
    """An SVG of cost against the metric; up and left is better."""
    if not points:
        return ""
    metric = points[0][1]["metric"]
    sign, better = (1, "higher") if metric["higher_is_better"] else (-1, "lower")
    costs = [cost for _, _, cost in points]
    qualities = [sign * row["metric"]["value"] for _, row, _ in points]
    low, high = limits(qualities)
    most = _round_step(1.1 * max(costs) / _TICKS) * _TICKS
    shares = [(max(quality, low) - low) / (high - low) for quality in qualities]
    across = [_LEFT + (_WIDTH - _LEFT - _RIGHT) * cost / most for cost in costs]
    down = [_HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share for share in shares]
    places = list(zip(across, down, strict=True))

    front = not_beaten(list(zip(costs, qualities, strict=True)))
    on_front = sorted(places[i] for i in front if qualities[i] >= low)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in on_front)
    name = f"{metric['name'] or 'metric'} ({better} is better)"
    parts = [_axes(most, (low, high), sign, label, name.replace("_", " "))]
    parts.append(f'<polyline class="front" points="{line}"/>')
    for i, (number, row, cost) in enumerate(points):
        kind = "front" if i in front else "other"
        kind = "base" if number == 0 else kind
        parts.append(_point(number, row, places[i], kind, f"{cost:.3g}"))
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    title = f'aria-label="{escape(label)} against {escape(name)}"'
    return f"<svg {box} role=img {title}>{''.join(parts)}</svg>"


def _point(number: int, row: Row, at: tuple[float, float], kind: str, cost: str) -> str:
    """A circle that can be hovered and focused, with its row in words."""
    metric = row["metric"]
    speed = f", {row['speedup']:.2f}x" if row["speedup"] else ""
    words = f"{row['name']}: {cost}{speed}, {metric['name']} {metric['value']:.4g}"
    if row["notes"]:
        words += f" ({row['notes']})"
    x, y = at
    return (
        f'<circle class={kind} cx="{x:.1f}" cy="{y:.1f}" r=6 tabindex=0 data-row="row{number}" '
        f'data-words="{escape(words)}"><title>{escape(words)}</title></circle>'
    )


def _axes(most: float, span: tuple[float, float], sign: int, label: str, name: str) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [f'<path class=axis d="M{_LEFT},{_TOP}V{bottom}H{right}"/>']
    for step in range(_TICKS + 1):
        share = step / _TICKS
        x = _LEFT + (right - _LEFT) * share
        y = bottom - (bottom - _TOP) * share
        value = sign * (span[0] + (span[1] - span[0]) * share)
        parts.append(f'<path class=grid d="M{_LEFT},{y:.1f}H{right}"/>')
        parts.append(f'<text x={_LEFT - 6} y="{y + 4:.1f}" class=y>{value:.4g}</text>')
        parts.append(f'<text x="{x:.1f}" y={bottom + 16} class=x>{most * share:.3g}</text>')
    parts.append(f"<text x={(_LEFT + right) / 2:.0f} y={_HEIGHT - 6} class=x>{label}</text>")
    middle = (bottom + _TOP) / 2
    turned = f'transform="rotate(-90 11 {middle:.0f})"'
    parts.append(f"<text x=11 y={middle:.0f} class=x {turned}>{escape(name)}</text>")
    return "".join(parts)


def _round_step(step: float) -> float:
    """The next larger one of 1, 2, 2.5, 5 times a power of ten."""
    if step <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * times for times in (1, 2, 2.5, 5, 10) if power * times >= step * 0.999)
