"""Turn measurements into a report: JSON for machines, Markdown and a plot for people, a table on
the console.

    measured = compare({"fp32": "model.pth", "int8": "int8.pth"}, inputs, evaluate=...)
    report = build_report(measured, data={"seed": 0})
    write_report(report, "artifacts")      # report.json, report.md, pareto.png
    print_report(report)

The first measurement is the baseline of every ratio and change. A row that is larger, slower or
worse than it stays in the table and says so. The plot is in `plot.py`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quantize.checkpoint import atomic_write
from quantize.host import describe_machine
from quantize.measuring.comparison import Measurement
from quantize.measuring.plot import pareto_plot

# A metric is better when higher if one of these is a word of its name; loss, bits_per_byte, error,
# ... are better lower.
_HIGHER = set(
    "accuracy acc top1 top5 f1 score cosine similarity auc precision recall bleu rouge map "
    "iou".split()
)
_SLOWER_BELOW = 0.98  # one model against itself, interleaved, came out at 0.99 and 1.01
# A change for the worse by more than this share of the baseline's value has this name; less is
# noise.
_GRADES = {0.1: "much worse", 0.01: "worse", 0.001: "slightly worse"}
_COUNTS = (
    "examples",
    "images",
    "samples",
    "count",
    "n",
)  # metrics that say how many a share was taken of

_MARKS = ("failed", "larger", "slower", *_GRADES.values())

Row = dict[str, Any]
Report = dict[str, Any]


def higher_is_better(metric: str) -> bool:
    """Whether a metric of this name is better when higher ("accuracy") or lower ("bits_per_byte",
    "loss").
    """
    words = metric.lower().replace("-", "_").split("_")
    return any(word in _HIGHER for word in words)


def build_rows(
    measurements: Sequence[Measurement],
    *,
    notes: Mapping[str, str] | None = None,
    higher: bool | None = None,
) -> list[Row]:
    """One row per measurement; the first one is the baseline.

    Keys: name, file (without its folder), bytes, bytes_ratio, parameters, latency_ms {median, p10,
    p90}, speedup, metric {name, value, higher_is_better, also}, metric_change (value minus the
    baseline's), load_s, peak_rss_mb, notes. What wasn't measured, or isn't finite, is None. `notes`
    adds to a row by name. `higher` overrides the guess from the metric's name.
    """
    if not measurements:
        raise ValueError("measurements is empty: a report needs at least one row, the baseline")
    unknown = set(notes or ()) - {m.name for m in measurements}
    if unknown:
        raise ValueError(
            f"notes for rows that aren't there: {sorted(unknown)}; rows: "
            f"{[m.name for m in measurements]}"
        )
    baseline = measurements[0]
    return [_row(m, baseline, (notes or {}).get(m.name), higher) for m in measurements]


def _row(m: Measurement, baseline: Measurement, note: str | None, higher: bool | None) -> Row:
    name, value = next(iter(m.metrics.items()), (None, None))
    higher = higher_is_better(name) if higher is None and name else higher
    before = baseline.metrics.get(name) if name else None
    change = value - before if value is not None and before is not None else None
    ratio = m.bytes / baseline.bytes if baseline.bytes else None

    marks = []
    if ratio is not None and ratio > 1:
        marks.append("larger")
    if m.speedup is not None and m.speedup < _SLOWER_BELOW:
        marks.append("slower")
    if value is not None and not math.isfinite(value):
        marks.append(f"worse: {name} is {value}")
    elif change is not None:
        grade = _grade(
            before,
            -change if higher else change,
            _noise(before, value, m.metrics) if higher else 0.0,
        )
        marks += [grade] if grade else []
    return _strict(
        {
            "name": m.name,
            "file": Path(m.file).name if m.file else None,
            "bytes": m.bytes,
            "bytes_ratio": ratio,
            "parameters": m.parameters,
            "latency_ms": None if m.latency_ms is None else vars(m.latency_ms),
            "speedup": m.speedup,
            "metric": {
                "name": name,
                "value": value,
                "higher_is_better": higher,
                "also": dict(list(m.metrics.items())[1:]),
            },
            "metric_change": change,
            "load_s": m.load_s,
            "peak_rss_mb": m.peak_rss_mb,
            "notes": "; ".join([*marks, *([note] if note else []), *m.notes]),
        }
    )


def _failed(name: str, reason: str, baseline: Row) -> Row:
    """The row of what couldn't be made or measured: the reason, and no numbers."""
    metric = {**baseline["metric"], "value": None, "also": {}}
    return {**dict.fromkeys(baseline), "name": name, "metric": metric, "notes": f"failed: {reason}"}


def _grade(before: float, loss: float, noise: float) -> str | None:
    """How much worse than `before` a metric is that has lost `loss`; None for noise.

    Without the scores of single examples noise is a convention: a thousandth of the value, and at
    least `noise`.
    """
    if loss <= noise:
        return None
    share = loss / abs(before) if before else math.inf
    return next((name for least, name in _GRADES.items() if share > least), None)


def _noise(before: float, value: float, metrics: Mapping[str, float]) -> float:
    """The standard error of a share (accuracy) of as many examples as the metrics say; 0 where they
    don't.
    """
    count = next((metrics[name] for name in _COUNTS if metrics.get(name)), 0)
    mean = (before + value) / 2
    return math.sqrt(mean * (1 - mean) / count) if count and 0 <= mean <= 1 else 0.0


def build_report(
    measurements: Sequence[Measurement],
    *,
    data: Mapping[str, Any] | None = None,
    notes: Mapping[str, str] | None = None,
    failed: Mapping[str, str] | None = None,
    higher: bool | None = None,
) -> Report:
    """`{"machine": {...}, "data": {...}, "rows": [...]}`, JSON values only.

    The machine's threads, their waiting and the allocator are those of the measuring processes.
    `data` is what the reader must know of the data and the run: what it is, batch, sequence length,
    seed, reference values. `failed`: why an artifact couldn't be made or measured, by name; a row
    each.
    """
    rows = build_rows(measurements, notes=notes, higher=higher)
    rows += [_failed(name, reason, rows[0]) for name, reason in (failed or {}).items()]
    return {
        "machine": _strict(measurements[0].machine()),
        "data": _strict(dict(data or {})),
        "rows": rows,
    }


def write_report(report: Report, folder: str | Path) -> list[Path]:
    """Write `report.json`, `report.md` and `pareto.png` into `folder`, each atomically; their
    paths. Raises OSError.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "report.json": (
            json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        ).encode(),
        "report.md": markdown(report).encode(),
        "pareto.png": pareto_plot(report["rows"]),
    }
    for name, content in contents.items():
        with atomic_write(folder / name) as file:
            file.write(content)
    return [folder / name for name in contents]


# People's view: the same cells for Markdown and the console.

_COLUMNS = tuple(
    "name|size|of base|params|latency ms|p10-p90|speed|metric|change|load s|peak MB|notes".split(
        "|"
    )
)
_LEAST_FIRST = (
    "p10-p90",
    "params",
    "peak MB",
    "load s",
    "of base",
    "change",
    "notes",
    "size",
    "speed",
)  # to leave out
_PIPED_WIDTH, _NOTES_WIDTH = 140, 12


def _cells(row: Row, decimals: int) -> list[str]:
    latency, metric = row["latency_ms"] or {}, row["metric"]
    return [
        row["name"],
        _size(row["bytes"]),
        _number(row["bytes_ratio"], "{:.3f}"),
        _count(row["parameters"]),
        _significant(latency.get("median")),
        f"{_significant(latency['p10'])}-{_significant(latency['p90'])}" if latency else "-",
        f"{_significant(row['speedup'])}x" if row["speedup"] else "-",
        _number(metric["value"], f"{{:z.{decimals}f}}"),
        _number(row["metric_change"], f"{{:+z.{decimals}f}}"),  # z: not -0.0000
        _significant(row["load_s"]),
        _number(row["peak_rss_mb"], "{:.0f}"),
        row["notes"],
    ]


def _decimals(rows: Sequence[Row]) -> int:
    """Of a metric: four, and for a small one as many as show four digits of the baseline's."""
    value = abs(rows[0]["metric"]["value"] or 1.0)
    return min(10, max(4, 3 - math.floor(math.log10(value))))


def _header(rows: Sequence[Row]) -> list[str]:
    metric = next((row["metric"] for row in rows if row["metric"]["name"]), None)
    title = metric["name"].replace("_", " ") if metric else "metric"
    return [
        {"metric": title, "of base": f"of {rows[0]['name']}"}.get(column, column)
        for column in _COLUMNS
    ]


def _legend(rows: Sequence[Row]) -> list[str]:
    """How to read the table, and whether to trust its times."""
    base = rows[0]["name"]
    lines = [
        f"Ratios, speed and change are against {base}; speed is the ratio of the latencies shown."
    ]
    metric = next((row["metric"] for row in rows if row["metric"]["name"]), None)
    if metric:
        better = "higher" if metric["higher_is_better"] else "lower"
        grades = ", ".join(f"{name} above {100 * least:g}%" for least, name in _GRADES.items())
        lines.append(
            f"{metric['name']}: {better} is better. Of its value at {base}: {grades}; less is "
            f"noise."
        )
    busy = [row["name"] for row in rows if "busy machine" in row["notes"]]
    if busy:
        lines.append(
            f"The machine was busy while {', '.join(busy)} ran: don't trust these times, "
            f"measure again."
        )
    return lines


def _about(report: Report) -> list[str]:
    facts = {k: v for k, v in report["data"].items() if v is not None}
    lines = describe_machine(report["machine"])
    if facts:
        lines.append("Run: " + "; ".join(_plain(k, v) for k, v in facts.items()))
    return lines


def markdown(report: Report) -> str:
    """The report as Markdown: the machine, then the table. What is larger, slower or worse than the
    baseline is bold.
    """
    rows = report["rows"]
    lines = ["# Report", "", *(f"- {_escape(line)}" for line in _about(report)), ""]
    lines += [
        "| " + " | ".join(_header(rows)) + " |",
        "|---|" + "--:|" * (len(_COLUMNS) - 2) + "---|",
    ]
    for row in rows:
        cells = [_escape(cell) for cell in _cells(row, _decimals(rows))]
        cells[-1] = "; ".join(
            f"**{n}**" if n.startswith(_MARKS) else n for n in cells[-1].split("; ")
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        *_legend(rows),
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
    for line in _about(report):
        console.print(Text(line), soft_wrap=True)
    rows = report["rows"]
    header, cells = _header(rows), [_cells(row, _decimals(rows)) for row in rows]
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(_COLUMNS))]
    shown = list(range(len(_COLUMNS)))
    for column in _LEAST_FIRST:
        notes = min(widths[-1], _NOTES_WIDTH) if shown[-1] == len(_COLUMNS) - 1 else 0
        if sum(widths[i] + 2 for i in shown if _COLUMNS[i] != "notes") + notes <= console.width:
            break
        shown.remove(_COLUMNS.index(column))
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
        bad = row["notes"].startswith(_MARKS)
        table.add_row(*(Text(line[i]) for i in shown), style="yellow" if bad else "")
    console.print()
    console.print(table)
    for line in _legend(rows):
        console.print(Text(line))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _significant(value: float | None) -> str:
    """Three digits: 0.123, 1.23, 12.3, 123."""
    return (
        "-"
        if value is None
        else f"{value:.{max(0, 2 - math.floor(math.log10(max(value, 1e-3))))}f}"
    )


def _size(count: int | None) -> str:
    if count is None:
        return "-"
    if count < 1e3:
        return f"{count} B"
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _count(count: int | None) -> str:
    if count is None:
        return "-"
    if count < 1e3:
        return str(count)
    return f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count / 1e3:.1f} k"


def _plain(name: str, value: Any) -> str:
    """A fact for people: `report.json` has long lists, whole hashes and all digits."""
    name = name.replace("_", " ")
    if isinstance(
        value, Mapping
    ):  # what its values are stands in its name: baselines_bits_per_byte
        return f"{name}: " + ", ".join(f"{key} {_short(entry)}" for key, entry in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return (
            f"{name}: {len(value)}"
            if len(value) > 4
            else f"{name}: {' x '.join(map(_short, value))}"
        )
    return f"{name}: {_short(value)}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = " ".join(str(value).split())
    return text[:12] if re.fullmatch("[0-9a-f]{32,}", text) else text


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _strict(value: Any) -> Any:
    """JSON values: non-finite numbers become None, paths and other objects text."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (int, str, type(None))) else str(value)
