"""What every benchmark does with its rows: flags, CSV files, columns of the machine, charts."""

from __future__ import annotations

import argparse
import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from quantize.allocator import keep_allocations
from quantize.checkpoint import atomic_write
from quantize.host import machine
from quantize.measuring import Measurement

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


class Parser(argparse.ArgumentParser):
    """The flags of a benchmark: its own, `--out` and `--threads`.

    Args:
        description: the benchmark's docstring, shown as it stands.
        out: the name of its CSV in benchmarks/results.
    """

    def __init__(self, description: str | None, out: str) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, allow_abbrev=False)
        self.flag("--out", "CSV that the rows go into", RESULTS / out)
        self.flag("--threads", "torch's threads", torch.get_num_threads())

    def flag(self, name: str, text: str, default: Any) -> None:
        """A flag that takes a value like its default, or several where that is a list."""
        kind, count = type(default), None
        if kind is list:
            kind, count = type(default[0]), "+"
        text = f"{text} (default: %(default)s)"
        self.add_argument(name, help=text, default=default, type=kind, nargs=count)

    def some(self, name: str, text: str, of: Iterable[str], default: Iterable[str] = ()) -> None:
        """A flag that takes some values of `of`; by default all."""
        choices = list(of)
        chosen = list(default) or choices
        self.add_argument(name, help=text, nargs="*", choices=choices, default=chosen)

    def file(self, name: str, text: str) -> None:
        """A flag that names a file or folder, None by default."""
        self.add_argument(name, help=text, type=Path)

    def parse_engines(self) -> argparse.Namespace:
        """`parse`, with the flags of `peers.side_by_side`."""
        self.flag("--rounds", "turns of each engine", 6)
        self.flag("--seconds", "length of a turn", 0.25)
        self.file("--cache", "folder that keeps what is exported")
        return self.parse()

    def parse(self) -> argparse.Namespace:
        """The flags; sets the threads, and the allocator as measuring processes have it."""
        arguments = self.parse_args()
        torch.set_num_threads(arguments.threads)
        keep_allocations()
        return arguments


def in_a_process(*flags: object, environment: Mapping[str, str] | None = None) -> list[Row]:
    """What this benchmark prints as lines of JSON when it is run again with these flags."""
    command = [sys.executable, sys.argv[0], *map(str, flags)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def read(path: Path) -> list[Row]:
    """The rows of a CSV file, all values text; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Sequence[Row], key: Sequence[str] = ()) -> None:
    """Write rows into a CSV file, atomically, and print them.

    Args:
        path: of the file. Its columns come first, then new ones.
        rows: floats are rounded to 4 decimals; a column that a row lacks stays empty.
        key: columns that name a row on a machine. Rows of the file with the same values there and
            the same CPU are replaced, the others kept; none: all are replaced.
    """
    kept = read(path) if key else []
    new = [{name: _rounded(value) for name, value in row.items()} for row in rows]
    merged: dict[Any, Row] = {}
    columns: dict[str, None] = {}
    for i, row in enumerate(kept + new):
        name = tuple(str(row.get(column)) for column in (*key, "cpu"))
        merged[name if key else i] = row
        columns |= dict.fromkeys(row)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(merged.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
    for row in new:
        shown = [f"{name}={value}" for name, value in row.items() if value is not None]
        print(*shown, flush=True)


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) and abs(value) > 1e-3 else value


def host(measured: Measurement | None = None) -> Row:
    """The columns of the machine: threads, cpu, torch, allocator; of this process, or of the one
    that measured.
    """
    known = measured.machine() if measured else machine()
    return {name: known[name] for name in ("threads", "cpu", "torch", "allocator")}


def chart(
    path: Path,
    panel: str,
    series: str,
    x: Callable[[Row], Any],
    y: str,
    labels: tuple[str, str],
    line: float | None = None,
) -> None:
    """Write a PNG beside a CSV file, a panel per value of a column, of the machine whose rows are
    the last.

    Args:
        path: of the CSV file.
        panel: the column whose values are the titles.
        series: the column whose values are the lines.
        x: a row's place; where that is text, the places stand side by side.
        y: the column that is shown; rows without it are left out.
        labels: what x and y are.
        line: where a dotted line marks the baseline; None: nowhere.
    """
    rows = [row for row in read(path) if row[y]]
    rows = [row for row in rows if row.get("cpu") == rows[-1].get("cpu")]
    titles = list(dict.fromkeys(row[panel] for row in rows))
    figure = Figure(figsize=(7 * max(1, len(titles)), 5), layout="constrained")
    for i, title in enumerate(titles):
        axes = figure.add_subplot(1, len(titles), i + 1)
        mine = [row for row in rows if row[panel] == title]
        for name in dict.fromkeys(row[series] for row in mine):
            points = [(x(row), float(row[y])) for row in mine if row[series] == name]
            axes.plot(*zip(*points, strict=True), "o-", linewidth=0.8, markersize=4, label=name)
        if line is not None:
            axes.axhline(line, color="gray", linestyle=":")
        axes.set(title=f"{panel} {title}", xlabel=labels[0], ylabel=labels[1])
        axes.tick_params(axis="x", labelsize=7, rotation=45)
        axes.legend(fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=110)
