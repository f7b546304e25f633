"""A report for people: the same table as Markdown and on the console."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from quantize.host import describe_machine
from quantize.measuring.rows import GRADES, MARKS, Report, Row

_COLUMNS = (
    *("name", "size", "of base", "params", "latency ms", "p10-p90"),
    *("speed", "metric", "change", "load s", "peak MB", "notes"),
)
# The columns that a narrow terminal does without, the first one first.
_LEAST_FIRST = (
    *("p10-p90", "params", "peak MB", "load s", "of base"),
    *("change", "notes", "size", "speed"),
)
_SHOWN_ELSEWHERE = ("layers", "reason")  # than in the line of the run
BUSY = "*"  # after a latency that was taken on a busy machine
_PIPED_WIDTH, _NOTES_WIDTH = 140, 12


def _cells(row: Row, decimals: int) -> list[str]:
    latency, metric = row["latency_ms"] or {}, row["metric"]
    return [
        row["name"],
        _count(row["bytes"], "B"),
        _number(row["bytes_ratio"], "{:.3f}"),
        _count(row["parameters"]),
        _significant(latency.get("median")) + (BUSY if "busy machine" in row["notes"] else ""),
        f"{_significant(latency['p10'])}-{_significant(latency['p90'])}" if latency else "-",
        f"{_significant(row['speedup'])}x" if row["speedup"] else "-",
        _number(metric["value"], f"{{:z.{decimals}f}}"),
        _number(row["metric_change"], f"{{:+z.{decimals}f}}"),  # z: not -0.0000
        _significant(row["load_s"]),
        _number(row["peak_rss_mb"], "{:.0f}"),
        row["notes"],
    ]


def _decimals(rows: Sequence[Row]) -> int:
    """Of a metric: four, and for a small one as many as show four digits of the baseline's; where
    that is 0 (a divergence), of the largest.
    """
    values = [abs(row["metric"]["value"] or 0.0) for row in rows]
    value = values[0] or max(values) or 1.0
    return min(10, max(4, 3 - math.floor(math.log10(value))))


def _header(rows: Sequence[Row]) -> list[str]:
    metric = next((row["metric"] for row in rows if row["metric"]["name"]), None)
    title = metric["name"].replace("_", " ") if metric else "metric"
    return [
        {"metric": title, "of base": f"of {rows[0]['name']}"}.get(column, column)
        for column in _COLUMNS
    ]


def header_and_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The titles of the columns, and the texts of each row."""
    return _header(rows), [_cells(row, _decimals(rows)) for row in rows]


def legend(rows: Sequence[Row]) -> list[str]:
    """How to read the table, and whether to trust its times."""
    base = rows[0]["name"]
    lines = [
        f"Ratios, speed and change are against {base}; speed is the ratio of the latencies shown."
    ]
    metric = next((row["metric"] for row in rows if row["metric"]["name"]), None)
    if metric and metric["higher_is_better"] is not None:
        better = "higher" if metric["higher_is_better"] else "lower"
        grades = ", ".join(f"{name} above {100 * least:g}%" for least, name in GRADES.items())
        told = f" Of its value at {base}: {grades}; less is noise." if metric["value"] else ""
        lines.append(f"{metric['name']}: {better} is better.{told}")
    busy = [row["name"] for row in rows if "busy machine" in row["notes"]]
    if busy:
        names = "each of them" if len(busy) == len(rows) else ", ".join(busy)
        told = f"The machine was busy while {names} ran: don't trust these times, measure again."
        lines.append(f"{BUSY} {told}")
    return lines


def chosen_name(report: Report) -> str | None:
    """The name of the row whose file was chosen, if one was."""
    chosen = report["data"].get("chosen")
    rows = report["rows"]
    return next((row["name"] for row in rows if chosen and row["file"] == chosen), None)


def described(report: Report) -> list[str]:
    """The machine and the run, a line each."""
    data = dict(report["data"])
    name = chosen_name(report)
    if name is not None:
        data["chosen"] = f"{name} ({data['chosen']})"
    facts = {k: v for k, v in data.items() if v is not None and k not in _SHOWN_ELSEWHERE}
    lines = describe_machine(report["machine"])
    if facts:
        lines.append("Run: " + "; ".join(_plain(k, v) for k, v in facts.items()))
    return lines


def markdown(report: Report) -> str:
    """The report as Markdown: the machine, then the table. What is larger, slower or worse than the
    baseline is bold.
    """
    rows = report["rows"]
    lines = ["# Report", "", *(f"- {_escape(line)}" for line in described(report)), ""]
    reason = report["data"].get("reason")
    lines += [_escape(str(reason)), ""] if reason else []
    lines += [
        "| " + " | ".join(_header(rows)) + " |",
        "|---|" + "--:|" * (len(_COLUMNS) - 2) + "---|",
    ]
    for row in rows:
        cells = [_escape(cell) for cell in _cells(row, _decimals(rows))]
        notes = cells[-1].split("; ")
        cells[-1] = "; ".join(f"**{n}**" if n.startswith(MARKS) else n for n in notes)
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        *legend(rows),
        "Every number was measured from the saved file, loaded again in a fresh process, "
        "unless its notes say otherwise.",
        "The files took turns, so that a slow moment of the machine hits all of them, and each "
        "turn weighs the same.",
        "Load time is from the file to a usable model, torch already imported; peak memory "
        "counts what was touched of torch.",
        "",
        "![Size and latency against quality](pareto.png)",
        "",
    ]
    return "\n".join(lines)


def print_report(report: Report, console: Console | None = None) -> None:
    """Print machine lines and table: plain text when piped; a narrow terminal gets fewer columns,
    never cut numbers.
    """
    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console.width = _PIPED_WIDTH  # nobody's window: rich would assume 80
    for line in described(report):
        console.print(Text(line), soft_wrap=True)
    rows = report["rows"]
    header, cells = header_and_cells(rows)
    shown = _that_fit(header, cells, console.width)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for i in shown:
        text = _COLUMNS[i] in ("name", "notes")
        table.add_column(
            header[i],
            justify="left" if text else "right",
            no_wrap=_COLUMNS[i] != "notes",
            overflow="fold",
        )
    for row, line in zip(rows, cells, strict=True):
        bad = row["notes"].startswith(MARKS)
        table.add_row(*(Text(line[i]) for i in shown), style="yellow" if bad else "")
    console.print()
    console.print(table)
    for line in legend(rows):
        console.print(Text(line))


def _that_fit(header: list[str], cells: list[list[str]], width: int) -> list[int]:
    """The columns to show in so many characters, by their places in `_COLUMNS`."""
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    shown, notes = list(range(len(_COLUMNS))), len(_COLUMNS) - 1
    for column in _LEAST_FIRST:
        needed = sum(widths[i] + 2 for i in shown if i != notes)
        needed += min(widths[notes], _NOTES_WIDTH) if notes in shown else 0
        if needed <= width:
            break
        shown.remove(_COLUMNS.index(column))
    return shown


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _significant(value: float | None) -> str:
    """Three digits: 0.123, 1.23, 12.3, 123."""
    if value is None:
        return "-"
    decimals = max(0, 2 - math.floor(math.log10(max(value, 1e-3))))
    return f"{value:.{decimals}f}"


def _count(count: int | None, unit: str = "") -> str:
    if count is None:
        return "-"
    if count < 1e3:
        return f"{count} {unit}".strip()
    return f"{count / 1e6:.2f} M{unit}" if count >= 1e6 else f"{count / 1e3:.1f} k{unit}"


def _plain(name: str, value: Any) -> str:
    """A fact for people: `report.json` has long lists, whole hashes and all digits."""
    name = name.replace("_", " ")
    text = _short(value)
    if isinstance(value, Mapping):  # its name says what its values are: baselines_bits_per_byte
        text = ", ".join(f"{key} {_short(entry)}" for key, entry in value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        text = f"{len(value)}" if len(value) > 4 else " x ".join(map(_short, value))
    return f"{name}: {text}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = " ".join(str(value).split())
    return text[:12] if re.fullmatch("[0-9a-f]{32,}", text) else text


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
