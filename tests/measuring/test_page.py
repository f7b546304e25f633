"""The report as one page: read by a parser, as a browser would."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from measuring.test_report import BASE, MEASUREMENTS, variant

from quantize.measuring.page import page
from quantize.measuring.report import build_report, read_report, write_report
from quantize.measuring.rows import build_rows, metric_noise

VOID = {"meta", "circle", "path", "polyline"}


class Reader(HTMLParser):
    """Elements with their attributes, and the text inside each kind; refuses wrong nesting."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID or tag == "circle":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def report():
    data = {"chosen": "int8.pth", "reason": "int8 keeps the budget", "seed": 0}
    data["layers"] = [{"name": "fc1", "got": "int8", "why": "3.1x as fast"}]
    busy = variant("odd<script>", notes=("busy machine: p90 is 2.1 times p10",))
    return build_report([*MEASUREMENTS, busy], data=data)


def test_the_page_needs_nothing_but_itself(report):
    """No address, no import, no image; it nests well, and has a style for dark screens and narrow
    ones."""
    text = page(report)
    reader = Reader(text)
    assert not re.search(r"https?:|@import|url\(|<link|<img|src=", text)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert len(reader.all("script")) == 1 and "$" not in text
    assert "<title>int8 and what it was chosen from" in text and "int8 (int8.pth)" in text


def test_every_point_tells_its_row(report):
    """A circle per measured row in both plots; its words have the row's numbers, its id exists."""
    reader = Reader(page(report))
    rows = report["rows"]
    circles = reader.all("circle")
    measured = [row for row in rows if row["metric"]["value"] is not None]
    timed = [row for row in measured if row["latency_ms"]]
    assert len(circles) == len(measured) + len(timed)
    lines = {line["id"]: line for line in reader.all("tr") if "id" in line}
    assert len(lines) == len(rows) and {c["data-row"] for c in circles} <= set(lines)
    words = " ".join(circle["data-words"] for circle in circles)
    for row in measured:
        assert row["name"] in words and f"{row['metric']['value']:.4g}" in words
    inside = [0 <= float(c["cx"]) <= 420 and 0 <= float(c["cy"]) <= 300 for c in circles]
    assert all(inside)


def test_choices_marks_and_odd_names_are_shown(report):
    """The chosen row, busy rows and worse rows have their classes; a name is text, not code."""
    reader = Reader(page(report))
    kinds = {line["id"]: line["class"].split() for line in reader.all("tr") if "id" in line}
    names = [row["name"] for row in report["rows"]]
    assert "chosen" in kinds[f"row{names.index('int8')}"]
    assert "bad" in kinds[f"row{names.index('pruned')}"]
    assert "busy" in kinds[f"row{names.index('odd<script>')}"]
    cells = reader.texts["td"]
    assert "odd<script>" in cells and {"fc1", "3.1x as fast"} <= set(cells)
    assert "int8 keeps the budget" in reader.texts["p"]
    assert "open_model('int8.pth')" in "".join(reader.texts["pre"])


def test_the_page_of_rows_without_a_metric_says_so():
    """No plot, and the reason."""
    text = page(build_report([variant("fp32", metrics={})]))
    assert "<svg" not in text and "nothing to plot" in text
    Reader(text)


def test_a_report_is_read_back(report, tmp_path):
    """`write_report` writes the page beside the rest; `read_report` gives what was written."""
    names = [path.name for path in write_report(report, tmp_path)]
    assert "report.html" in names and read_report(tmp_path) == report
    assert (tmp_path / "report.html").read_text() == page(report)


def test_worse_is_graded_by_the_metrics_own_noise():
    """A change within the standard error that `evaluate` gives is none; a larger one is graded."""
    rows = []
    for error in (0.01, 0.001):
        metrics = {"bits_per_byte": 1.704, "standard_error": error}
        rows += build_rows([BASE, variant("int8", metrics=metrics)])[1:]
    assert [row["notes"] for row in rows] == ["", "slightly worse"]
    assert metric_noise(0.5, 0.5, {"accuracy": 0.5, "examples": 100}) == pytest.approx(0.05)
    assert metric_noise(1.7, 1.7, {"bits_per_byte": 1.7}) == 0
    alike = {"accuracy": 1.0, "standard_error": 0.0, "examples": 98}
    assert metric_noise(1.0, 1.0, alike) == pytest.approx((0.99 * 0.01 / 98) ** 0.5)
    assert metric_noise(0.7, 0.7, alike) == 0
