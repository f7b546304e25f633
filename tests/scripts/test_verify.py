"""`quantize verify`: which claims of an artifact hold, and what would check the others."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
from helpers import measured_by_bytes
from torch import nn

import quantize
from quantize import cli
from quantize.commands import source
from quantize.compression.search.divergence import Divergence, held_out
from quantize.jobs.samples import read_samples
from quantize.measuring.report import build_report, write_report

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture
def small(decoder) -> nn.Module:
    return quantize.quantize_dynamic(quantize.open_model(decoder), prefer="size")


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text(TEXT[:400])
    return path


def written(folder: Path, small: nn.Module, decoder: Path, data: Path, **wrong: float) -> Path:
    """A file, and a report of what it is beside the decoder, with `wrong` factors to its claims."""
    folder.mkdir(exist_ok=True)
    file = folder / "int8.pth"
    quantize.save(small, file)
    batches = held_out(read_samples([data], small, decoder, batch=2, length=16))
    loss = Divergence(quantize.open_model(decoder), batches).score(small).loss
    report = build_report(measured_by_bytes({"fp32": decoder, "int8": file}))
    for row, value in zip(report["rows"], (0.0, loss), strict=True):
        better = {"higher_is_better": False, "also": {}}
        row["metric"] = {"name": "kl_divergence", "value": value} | better
    row = report["rows"][1]
    row["speedup"] = 4.2 * wrong.get("speedup", 1)
    row["bytes"] *= wrong.get("bytes", 1)
    row["metric"]["value"] *= wrong.get("metric", 1)
    write_report(report, folder)
    return file


@pytest.mark.usefixtures("no_chart", "faster")
@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"metric": 0.25}, "metric"),
        pytest.param({"bytes": 2}, "bytes", marks=pytest.mark.slow),
        pytest.param({"speedup": 1.2}, "latency", marks=pytest.mark.slow),
        pytest.param({}, "", marks=pytest.mark.slow),
    ],
)
def test_verify_names_the_claim_that_does_not_hold(
    wrong, names, small, decoder, data, tmp_path, capsys
):
    """A report that says too much of one thing: that claim fails, the others hold, exit code 1."""
    file = written(tmp_path, small, decoder, data, **wrong)
    line = ["verify", str(file), "--data", str(data)]
    line += "--batch 2 --length 16 --threads 1".split()
    assert cli.main(line) == (1 if wrong else 0)
    told = capsys.readouterr().out.splitlines()
    failed = [finding.split()[0] for finding in told if "FAILS" in finding]
    assert failed == names.split() and len(told) == 4


def test_verify_says_what_it_could_not_check(decoder, capsys):
    """A file without a report: only its digests are known."""
    assert cli.main(["verify", str(decoder), "--threads", "1"]) == 0
    told = capsys.readouterr().out
    assert told.count("not checked") == 3 and "SHA-256" in told


@pytest.mark.usefixtures("no_chart", "faster")
def test_verify_knows_what_a_search_beside_was_given(small, decoder, data, tmp_path, capsys):
    """Elsewhere it names the flags that would check the ratio and the metric; beside the search,
    that isn't needed, and the metric is the very one of the report.
    """
    file = written(tmp_path / "small", small, decoder, data)
    assert cli.main(["verify", str(file), "--threads", "1"]) == 0
    told = capsys.readouterr().out.splitlines()
    unknown = [line for line in told if "not checked" in line]
    assert len(unknown) == 2 and all("give --baseline" in line for line in unknown)
    assert "--data" in unknown[1]
    search = tmp_path / "small.search"
    search.mkdir()
    shapes = {"batch": 2, "batches": None, "length": 16, "image_size": None}
    source.write_asked(Namespace(source=decoder, data=[data], **shapes), search)
    assert cli.main(["verify", str(file), "--threads", "1"]) == 0
    told = capsys.readouterr().out
    (loss,) = set(re.findall(r"kl_divergence is (\S+) here, the report says \1;", told))
    assert told.count(" holds: ") == 4 and float(loss) > 0


def test_the_original_of_a_python_file_is_that_of_the_search(data, tmp_path):
    """No code runs that the command line doesn't name; what is given there stays."""
    search, original = tmp_path / "small.search", tmp_path / "small.search" / "original.safetensors"
    search.mkdir()
    (tmp_path / "small").mkdir()
    for path in (original, tmp_path / "net.py"):
        path.touch()
    nothing = dict.fromkeys(source.SHAPES)
    given = Namespace(source=tmp_path / "net.py", data=[data], **nothing | {"batch": 2})
    source.write_asked(given, search)
    asked = Namespace(source=tmp_path / "small", baseline=None, data=None, **nothing)
    source.read_asked(asked)
    assert (asked.baseline, asked.data, asked.batch) == (original, [data], 2)
    asked = Namespace(source=tmp_path / "small", baseline=data, data=[original], **nothing)
    source.read_asked(asked)
    assert (asked.baseline, asked.data, asked.batch) == (data, [original], None)
    for damaged in ("{", "[]", "{}"):
        (search / source.ASKED).write_text(damaged)
        with pytest.raises(ValueError, match="isn't what `quantize compress` wrote"):
            source.read_asked(asked)


@pytest.mark.usefixtures("no_chart")
def test_a_busy_machine_breaks_no_claim(small, decoder, data, tmp_path, faster, capsys):
    """A ratio that falls short while others compute says nothing of the file."""
    faster(1.1, "busy machine: p90 is 3.0 times p10")
    file = written(tmp_path, small, decoder, data)
    assert cli.main(["verify", str(file), "--threads", "1"]) == 0
    assert "latency ratio not checked: 1.10 here" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [[], [1], [{"name": "int8"}], "rows"])
def test_a_report_of_something_else_is_refused(rows, decoder, tmp_path, capsys):
    """In one line, where the rows aren't ours."""
    content = {"machine": {}, "data": {}, "rows": rows}
    (tmp_path / "report.json").write_text(json.dumps(content))
    for command in ("verify", "report"):
        path = decoder if command == "verify" else tmp_path
        assert cli.main([command, str(path), "--threads", "1"]) == 2
        assert "is no report of this package" in capsys.readouterr().err
