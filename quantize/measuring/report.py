"""Turn measurements into a report: JSON for machines, Markdown, a plot and a page for
people.

    measured = compare({"fp32": "model.pth", "int8": "int8.pth"}, inputs, evaluate=...)
    report = build_report(measured, data={"seed": 0})
    write_report(report, "artifacts")      # report.json, report.md, pareto.png, report.html
    print_report(report)                   # of `table.py`

The first measurement is the baseline of every ratio and change. A row that is larger, slower or
worse than it stays in the table and says so (`rows.py`). The plot is in `plot.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantize.checkpoint import CheckpointError, atomic_write
from quantize.measuring.artifact import check_there
from quantize.measuring.page import page
from quantize.measuring.plot import pareto_plot
from quantize.measuring.result import Measurement
from quantize.measuring.rows import FIELDS, Report, build_rows, failed_row, strict
from quantize.measuring.table import markdown

REPORT_FILES = ("report.json", "report.md", "pareto.png", "report.html")


def build_report(
    measurements: Sequence[Measurement],
    *,
    data: Mapping[str, Any] | None = None,
    notes: Mapping[str, str] | None = None,
    failed: Mapping[str, str] | None = None,
) -> Report:
    """`{"machine": {...}, "data": {...}, "rows": [...]}`, JSON values only.

    The machine's threads, their waiting and the allocator are those of the measuring processes.

    Args:
        measurements: of `compare`; the first one is the baseline.
        data: what the reader must know of the data and the run: what it is, batch, sequence length,
            seed, reference values.
        notes: added to a row, by name.
        failed: why an artifact couldn't be made, by name; a row each.
    """
    rows = build_rows(measurements, notes=notes)
    rows += [failed_row(name, reason, rows[0]) for name, reason in (failed or {}).items()]
    return {
        "machine": strict(measurements[0].machine()),
        "data": strict(dict(data or {})),
        "rows": rows,
    }


def write_report(report: Report, folder: str | Path) -> list[Path]:
    """Write `report.json`, `report.md`, `pareto.png` and `report.html` into `folder`, each
    atomically; their paths. Raises OSError.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False)
    written = (
        f"{values}\n".encode(),
        markdown(report).encode(),
        pareto_plot(report["rows"]),
        page(report).encode(),
    )
    for name, content in zip(REPORT_FILES, written, strict=True):
        with atomic_write(folder / name) as file:
            file.write(content)
    return [folder / name for name in REPORT_FILES]


def read_report(path: str | Path) -> Report:
    """What `write_report` wrote.

    Args:
        path: its folder, or the report.json in it.

    Raises:
        CheckpointError: no such file, or no report.
    """
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    check_there(path)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not _is_report(report):
        raise CheckpointError(f"{path}: is no report of this package")
    return report


def _is_report(values: Any) -> bool:
    if not isinstance(values, dict) or not values.keys() >= {"machine", "data", "rows"}:
        return False
    rows = values["rows"]
    if not rows or not isinstance(rows, list) or not isinstance(values["data"], dict):
        return False
    return all(isinstance(row, dict) and row.keys() >= set(FIELDS) for row in rows)
