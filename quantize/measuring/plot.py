"""The charts of reports and scripts, as PNG bytes, in one style.

`pareto_plot` shows file size and latency against quality, up and left is better in both panels.
Matplotlib is imported by the first chart or `prepare`: it takes a third of a second, which no
measuring process has to spend.
"""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantize.measuring.rows import limits, not_beaten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = {"baseline": "#222222", "front": "#0a6ebd", "other": "#8a8f98"}


def prepare() -> None:
    """Import what charts need, for a caller who counts the seconds."""
    importlib.import_module("matplotlib.figure")


def pareto_plot(rows: Sequence[dict[str, Any]]) -> bytes:
    """PNG bytes. Rows without a metric are left out; what is far worse than the rest stands on the
    lower edge.
    """
    height = max(5.2, 0.2 * len(rows))
    figure, (left, right) = _panels(2, (13, height), sharey=True)
    shown = [r for r in rows if r["metric"]["value"] is not None]
    metric = shown[0]["metric"] if shown else {"name": "metric", "higher_is_better": True}
    sign = 1 if metric["higher_is_better"] else -1
    floor, ceiling = limits([sign * r["metric"]["value"] for r in shown])

    sizes = [(r, r["bytes"] / 1e6, None) for r in shown]
    latencies = [(r, r["latency_ms"]["median"], r["latency_ms"]) for r in shown if r["latency_ms"]]
    panels = (
        (left, sizes, "file size, MB"),
        (right, latencies, "latency, ms (bars: 10th to 90th percentile)"),
    )
    for axes, points, title in panels:
        axes.set_ylim(*sorted((sign * floor, sign * ceiling)))
        if sign < 0:
            axes.invert_yaxis()  # better is up
        axes.set_xlabel(title)
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
        _draw(axes, points, sign, floor, rows[0]["name"])
    better = "higher" if sign > 0 else "lower"
    left.set_ylabel(f"{metric['name'].replace('_', ' ')}, {better} is better (better is up)")
    figure.suptitle(
        "Up and left is better; the line joins what no other file beats in both cost and quality",
        fontsize=11,
    )
    return _png(figure)


def bar_chart(panels: Mapping[str, Mapping[str, float]], label: str) -> bytes:
    """Bars of values by name, a panel per title; the first bar of each is the baseline.

    Args:
        panels: title -> name -> value.
        label: what the values are, with their unit.

    Returns:
        PNG bytes.
    """
    figure, all_axes = _panels(len(panels), (4.5 * len(panels), 3.2))
    for axes, (title, values) in zip(all_axes, panels.items(), strict=True):
        colors = [_COLORS["baseline"]] + [_COLORS["front"]] * (len(values) - 1)
        bars = axes.barh(list(values), list(values.values()), color=colors)
        axes.bar_label(bars, fmt="%.3g", padding=3)
        axes.set(title=title, xlabel=label, xlim=(0, 1.2 * max(values.values())))
        axes.grid(visible=False, axis="y")
        axes.invert_yaxis()
    return _png(figure)


def line_chart(lines: Mapping[str, Mapping[int, float]], x_label: str, y_label: str) -> bytes:
    """Lines through points on two logarithmic axes, with plain numbers beside them.

    Args:
        lines: name -> x -> y, both above 0.
        x_label: what x is.
        y_label: what y is, with its unit.

    Returns:
        PNG bytes.
    """
    from matplotlib.ticker import LogLocator

    figure, (axes,) = _panels(1, (8, 5))
    for name, points in lines.items():
        axes.plot(list(points), list(points.values()), "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
    places: set[int] = set()
    for points in lines.values():
        places.update(points)
    ticks = _apart(sorted(places))
    axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axes.yaxis.set_major_formatter("{x:g}")  # 0.5, not 5 x 10^-1
    axes.minorticks_off()
    axes.legend(frameon=False)
    return _png(figure)


def _apart(places: list[int]) -> list[int]:
    """Those of rising places whose labels don't run into the next one's on a logarithmic axis."""
    following = [*places[1:], math.inf]
    return [x for x, after in zip(places, following, strict=True) if after > 1.15 * x]


def _panels(count: int, size: tuple[float, float], **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes side by side, in the style of all charts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False, **options)[0])
    for axes in panels:
        axes.grid(alpha=0.25, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _draw(axes: Axes, points: list, sign: int, floor: float, baseline: str) -> None:
    """Markers, bars, names and the line along the front."""
    low, high = sorted(axes.get_ylim())
    edge = floor + 0.04 * (high - low)
    front = not_beaten([(x, sign * row["metric"]["value"]) for row, x, _ in points])
    named, line = [], []
    for i, (row, x, spread) in enumerate(points):
        value = row["metric"]["value"]
        off = sign * value < floor
        y = sign * edge if off else value
        kind = "front" if i in front else "other"
        marker = "o"
        if row["name"] == baseline:
            kind, marker = "baseline", "s"
        marker = "v" if off else marker
        color = _COLORS[kind]
        ends = [spread["p10"], spread["p90"]] if spread else [x, x]
        axes.plot(ends, [y, y], color=color, linewidth=1.2, alpha=0.6, clip_on=False)
        axes.plot([x], [y], marker, color=color, markersize=7, clip_on=False, zorder=3)
        named.append((sign * y, x, f"{row['name']} ({value:.3g})" if off else row["name"]))
        if i in front and not off:
            line.append((x, y))
    axes.plot(*zip(*sorted(line), strict=True), color=_COLORS["front"], linewidth=1.0, alpha=0.5)
    axes.set_xlim(left=0)
    _name(axes, named, sign)


def _name(axes: Axes, points: list[tuple[float, float, str]], sign: int) -> None:
    """Write the names in a column beside the panel, in the order of their points' qualities, each
    with a line to its point.
    """
    for i, (quality, x, text) in enumerate(sorted(points)):
        axes.annotate(
            f" {text}",
            (x, sign * quality),
            (1.05, (i + 0.5) / len(points)),
            textcoords="axes fraction",
            fontsize=9,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": _COLORS["other"],
                "linewidth": 0.6,
                "alpha": 0.7,
                "relpos": (0, 0.5),
                "patchA": None,  # nothing to clip the line by, which takes half of the time
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )
