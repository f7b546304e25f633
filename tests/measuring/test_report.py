"""The report: rows from measurements, marks for what got larger, slower or worse, and the files
that hold it.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import pytest
from matplotlib import image
from rich.console import Console

from quantize.measuring.plot import pareto_plot
from quantize.measuring.report import REPORT_FILES, build_report, write_report
from quantize.measuring.result import Latency, Measurement
from quantize.measuring.rows import build_rows, higher_is_better, limits
from quantize.measuring.table import markdown, print_report

KEYS = (
    "name file bytes bytes_ratio parameters latency_ms speedup metric metric_change load_s "
    "peak_rss_mb notes"
).split()
BASE = Measurement(
    name="fp32",
    file="artifacts/model.pth",
    bytes=8_000_000,
    parameters=2_000_000,
    latency_ms=Latency(20.0, 19.0, 23.0),
    speedup=1.0,
    metrics={"bits_per_byte": 1.70, "accuracy": 0.66},
    load_s=0.05,
    first_call_ms=30.0,
    peak_rss_mb=400.0,
    output_sha256="0",
    threads=2,
    allocator="glibc 2.36, default (returns large blocks)",
)


def variant(name: str, **changes) -> Measurement:
    return replace(BASE, **{"name": name, "file": f"artifacts/{name}.pth", **changes})


MEASUREMENTS = [
    BASE,
    variant(
        "fp16", bytes=4_010_000, speedup=0.7, metrics={"bits_per_byte": 1.70001, "accuracy": 0.66}
    ),
    variant(
        "int8",
        bytes=2_100_000,
        latency_ms=Latency(9.0, 8.8, 9.9),
        speedup=2.2,
        metrics={"bits_per_byte": 1.704, "accuracy": 0.65},
    ),
    variant(
        "pruned",
        bytes=5_000_000,
        latency_ms=Latency(14.0, 13.8, 16.0),
        speedup=1.4,
        metrics={"bits_per_byte": 4.1},
    ),
    variant(
        "broken",
        bytes=9_000_000,
        latency_ms=None,
        speedup=None,
        metrics={"bits_per_byte": float("nan")},
        notes=("hand-made",),
    ),
]


def test_rows_hold_exactly_the_agreed_fields():
    """Every row has the same keys, whatever was measured."""
    assert all(list(row) == KEYS for row in build_rows(MEASUREMENTS))
    assert set(build_rows(MEASUREMENTS)[0]["latency_ms"]) == {"median", "p10", "p90"}


def test_ratios_and_changes_are_against_the_first_row():
    """bytes_ratio, metric_change: against the baseline; speedup: as measured."""
    fp32, _, int8, *_ = build_rows(MEASUREMENTS)
    assert fp32["bytes_ratio"] == 1 and fp32["metric_change"] == 0 and fp32["notes"] == ""
    assert int8["bytes_ratio"] == 2_100_000 / 8_000_000 and int8["speedup"] == 2.2
    assert int8["metric_change"] == pytest.approx(0.004) and int8["metric"]["also"] == {
        "accuracy": 0.65
    }
    assert int8["file"] == "int8.pth"


def test_what_got_larger_slower_or_worse_is_marked():
    """The notes say it, worse by its degree, and a change within the noise is no change."""
    _, fp16, int8, pruned, broken = build_rows(MEASUREMENTS, notes={"pruned": "not retrained"})
    assert fp16["notes"] == "slower"
    assert int8["notes"] == "slightly worse"
    assert pruned["notes"] == "much worse; not retrained"
    assert broken["notes"] == "larger; worse: bits_per_byte is nan; hand-made"


def test_what_failed_has_a_row_that_says_why():
    """And no numbers; an engine of unknown size has the others."""
    failed = variant("engine", bytes=None, latency_ms=None, metrics={}, failed="no such engine")
    unknown = variant("other", bytes=None, parameters=None, speedup=2.0)
    row, other = build_rows([BASE, failed, unknown])[1:]
    assert row["notes"] == "failed: no such engine"
    assert {row[key] for key in ("bytes", "bytes_ratio", "latency_ms", "speedup")} == {None}
    assert other["bytes_ratio"] is None and other["speedup"] == 2.0 and other["notes"] == ""
    assert "**failed: no such engine**" in markdown(build_report([BASE, failed]))


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        ("accuracy", True),
        ("next_byte_accuracy", True),
        ("f1", True),
        ("Accuracy (%)", True),
        ("recall@5", True),
        ("cosine_distance", False),
        ("bits_per_byte", False),
        ("loss", False),
        ("error", False),
    ],
)
def test_direction_of_a_metric(metric, higher):
    """Accuracy falls when it gets worse, bits per byte rise."""
    assert higher_is_better(metric) is higher
    worse = 0.1 if not higher else -0.1
    rows = build_rows(
        [variant("a", metrics={metric: 0.5}), variant("b", metrics={metric: 0.5 + worse})]
    )
    assert rows[1]["notes"] == "much worse"
    rows = build_rows(
        [variant("a", metrics={metric: 0.5}), variant("b", metrics={metric: 0.5 - worse})]
    )
    assert rows[1]["notes"] == ""


def test_a_metric_of_unknown_direction_is_not_graded():
    """A bare number is named "metric": a change of it is shown and not graded."""
    rows = build_rows(
        [variant("a", metrics={"metric": 0.9}), variant("b", metrics={"metric": 0.5})]
    )
    assert rows[1]["metric"]["higher_is_better"] is None
    assert rows[1]["metric_change"] == pytest.approx(-0.4) and rows[1]["notes"] == ""


@pytest.mark.parametrize(
    ("before", "after", "notes"),
    [
        (1.4649, 1.4651, ""),
        (1.4649, 1.4679, "slightly worse"),
        (1.4649, 1.4850, "worse"),
        (1.4649, 1.8667, "much worse"),
        (3e-4, 2.9e-4, ""),
        (3e-4, 3.1e-4, "worse"),
        (-2.0, -1.9, "worse"),
        (0.0, 0.1, "much worse"),
        (0.0, 0.0, ""),
    ],
)
def test_worse_has_degrees(before, after, notes):
    """By the share of the baseline's value: a thousandth is noise, also of small, negative and zero
    losses.
    """
    rows = build_rows(
        [variant("a", metrics={"loss": before}), variant("b", metrics={"loss": after})]
    )
    assert rows[1]["notes"] == notes


@pytest.mark.parametrize(
    ("count", "after", "notes"),
    [
        (359, 0.964, ""),
        (359, 0.94, "worse"),
        (100_000, 0.964, "slightly worse"),
        (None, 0.964, "slightly worse"),
    ],
)
def test_noise_of_an_accuracy_is_known_from_its_count(count, after, notes):
    """2 of 359 images are less than a standard error; 600 of 100,000 aren't."""
    also = {} if count is None else {"images": count}
    rows = build_rows(
        [variant(n, metrics={"accuracy": v, **also}) for n, v in (("a", 0.97), ("b", after))]
    )
    assert rows[1]["notes"] == notes


def test_numbers_say_something(capsys, monkeypatch):
    """No minus before a zero, no loss, size, count, speed or time that is rounded to nothing."""
    monkeypatch.setenv("COLUMNS", "200")
    small = {
        "bytes": 272,
        "parameters": 68,
        "load_s": 0.00012,
        "latency_ms": Latency(0.0123, 0.0119, 0.0131),
    }
    base = variant("a", **small, metrics={"loss": 3.21e-5})
    print_report(
        build_report(
            [base, variant("b", **small, speedup=0.0042, metrics={"loss": 3.2099999999e-5})]
        )
    )
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("b "))
    assert (
        "272 B" in line
        and " 68 " in line
        and "0.0123" in line
        and "0.00012" in line
        and "0.0042" in line
    )
    assert "0.00003210" in line and "+0.00000000" in line
    same = [variant("a", metrics={"loss": 1.5}), variant("b", metrics={"loss": 1.49999999})]
    print_report(build_report(same))
    assert "-0.0" not in capsys.readouterr().out


@pytest.mark.usefixtures("no_chart")
def test_a_busy_machine_is_named_under_the_table(tmp_path, capsys):
    """For every row whose times moved, on the console and in Markdown."""
    busy = variant("int8", notes=("busy machine: p90 is 2.1 times p10",))
    report = build_report([BASE, busy, variant("fp16")])
    write_report(report, tmp_path)
    print_report(report)
    for text in (capsys.readouterr().out, (tmp_path / "report.md").read_text()):
        assert "The machine was busy while int8 ran" in text
    assert "busy" not in str(build_report([BASE]))


@pytest.mark.usefixtures("no_chart")
def test_json_is_strict_and_complete(tmp_path):
    """report.json is machine, data and rows, without NaN, and reads back as what was built."""
    report = build_report(
        MEASUREMENTS, data={"seed": 0, "gzip_bits_per_byte": 1.87, "odd": float("inf")}
    )
    write_report(report, tmp_path)

    def refuse(constant):
        raise AssertionError(f"{constant} in JSON")

    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert read == report and list(read) == ["machine", "data", "rows"]
    assert read["machine"]["threads"] == 2 and read["machine"]["allocator"] == BASE.allocator
    assert read["data"]["odd"] is None and read["rows"][-1]["metric"]["value"] is None


@pytest.mark.slow
def test_files_are_replaced_whole(tmp_path):
    """Writing twice leaves the files of a report and nothing else."""
    report = build_report(MEASUREMENTS)
    for _ in range(2):
        paths = write_report(report, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == set(REPORT_FILES)
    assert sorted(paths) == sorted(tmp_path.iterdir())


@pytest.mark.usefixtures("no_chart")
def test_markdown_has_the_machine_above_a_table_of_all_rows(tmp_path):
    """Machine lines first; each row has as many cells as the header; marks are bold; a bar in a
    note breaks nothing.
    """
    report = build_report(MEASUREMENTS, data={"seed": 7}, notes={"int8": "a | b"})
    write_report(report, tmp_path)
    text = (tmp_path / "report.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert text.index("Instruction sets:") < text.index("seed: 7") < text.index(table[0])
    assert len(table) == 2 + len(MEASUREMENTS)
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert "**slower**" in table[3] and "**slightly worse**; a \\| b" in table[4]


@pytest.mark.usefixtures("no_chart")
def test_facts_are_short_for_people_and_whole_for_machines(tmp_path, capsys, monkeypatch):
    """Lists as a count, hashes as 12 digits, numbers rounded; in a pipe every column is there.
    report.json has all of it.
    """
    monkeypatch.delenv("COLUMNS", raising=False)
    facts = {"files": [f"file{i}.py" for i in range(46)], "data_sha256": "0123456789abcdef" * 4}
    facts |= {
        "baselines_bits_per_byte": {"gzip -9": 1.90712345, "xz -9e": 1.5190001},
        "example_inputs": [4, 128],
    }
    report = build_report(MEASUREMENTS, data=facts)
    write_report(report, tmp_path)
    print_report(report)
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["data"] == facts
    for text in (printed, (tmp_path / "report.md").read_text()):
        assert (
            "files: 46; data sha256: 0123456789ab; baselines bits per byte: gzip -9 1.907, xz "
            "-9e 1.519;" in text
        )
        assert "example inputs: 4 x 128" in text and "p10-p90" in text and "peak MB" in text


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_console_table_fits_and_is_plain_when_piped(width):
    """No line of the table is wider than the window, every row is there, and there are no escape
    codes in a pipe.
    """
    out = io.StringIO()
    print_report(build_report(MEASUREMENTS), Console(file=out, width=width))
    text = out.getvalue()
    assert "\x1b" not in text
    table = text[text.index("\nname") :]
    assert all(m.name in table for m in MEASUREMENTS) and "1.7040" in table and "2.20x" in table
    assert max(len(line) for line in table.splitlines()) <= width


@pytest.mark.parametrize("count", [1, 2, len(MEASUREMENTS)])
def test_plot_is_an_image_for_any_number_of_rows(count):
    """Also for one row, equal rows, and rows without latency or metric."""
    png = pareto_plot(
        build_rows(
            [
                *MEASUREMENTS[:count],
                variant("twin"),
                variant("unmeasured", latency_ms=None, metrics={}),
            ]
        )
    )
    assert image.imread(io.BytesIO(png)).shape[:2] == (780, 1950)


@pytest.mark.parametrize(
    "values", [[1.4649, 1.4651, 1.4650], [0.9721, 0.9719], [3.9533, 3.9531], [2.0, 2.0], [0.0, 0.0]]
)
def test_noise_does_not_fill_the_plot(values):
    """Qualities that differ by a thousandth stand side by side: the axis spans a hundredth of the
    best at least.
    """
    low, high = limits(values)
    assert low < min(values) and max(values) < high
    assert high - low >= 0.01 * max(values) and max(values) - min(values) <= 0.2 * (high - low)


def test_empty_and_unknown_are_refused():
    """A report needs a baseline, and notes need a row."""
    with pytest.raises(ValueError, match="measurements is empty"):
        build_rows([])
    with pytest.raises(ValueError, match="int4"):
        build_rows(MEASUREMENTS, notes={"int4": "?"})
