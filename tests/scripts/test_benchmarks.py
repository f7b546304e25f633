"""What the benchmarks share: rows that are merged into a CSV file, and peers beside each other."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import random_graphs, rows

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_rows_replace_those_of_the_same_key(tmp_path, capsys):
    """In their place, whatever else was measured stays, and new columns come last."""
    file = tmp_path / "results" / "rows.csv"
    old = [{"model": "a", "batch": 1, "ms": 2.0}, {"model": "b", "batch": 1, "ms": 3.0}]
    rows.write(file, old, ("model", "batch"))
    new = [{"model": "a", "batch": 1, "ms": 1.00004, "note": "quick, and new"}]
    rows.write(file, [*new, {"model": "a", "batch": 8, "note": None}], ("model", "batch"))
    assert file.read_text().splitlines() == [
        "model,batch,ms,note",
        'a,1,1.0,"quick, and new"',
        "b,1,3.0,",
        "a,8,,",
    ]
    assert capsys.readouterr().out.splitlines()[2] == "model=a batch=1 ms=1.0 note=quick, and new"
    rows.write(file, [{"x": 1e-7}, {"x": 2}])
    assert rows.read(file) == [{"x": "1e-07"}, {"x": "2"}]
    assert rows.read(tmp_path / "none.csv") == []


def test_committed_rows_are_read_and_written_alike(tmp_path):
    """A file of benchmarks/results is written back with the same columns and rows."""
    for committed in sorted((BENCHMARKS / "results").glob("*.csv")):
        found = rows.read(committed)
        rows.write(tmp_path / "again.csv", found)
        assert rows.read(tmp_path / "again.csv") == found, committed.name


def test_a_chart_is_drawn_of_any_rows(tmp_path):
    """A panel per model, rows without a number left out; no rows, no panel."""
    file = tmp_path / "rows.csv"
    rows.write(file, [{"model": "a", "engine": "x", "batch": 1, "speedup": 2.0}, {"model": "a"}])
    for _ in range(2):
        rows.chart(file, "model", "engine", lambda row: row["batch"], "speedup", ("x", "y"), 1)
        assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        rows.write(file, [{"model": "a", "engine": "x", "batch": 1, "speedup": ""}])


def absent(case):
    raise ImportError("no such engine")


@pytest.mark.slow
@pytest.mark.usefixtures("one_nursery")
def test_peers_run_side_by_side(tmp_path, monkeypatch):
    """One that can't be set up, and one that fails where it runs, cost their own rows only."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop("models", None)
    peers = pytest.importorskip("peers")
    case = peers.Case(lambda: nn.Linear(4, 4), torch.ones(1, 4), tmp_path)
    engines = {
        "eager": peers.eager,
        "absent": absent,
        "frozen": peers.torchscript_frozen,
        "broken": lambda case: peers.eager(case, lambda model: nn.Linear(3, 3)),
    }
    assert list(peers.chosen(engines, ["broken"])) == ["eager", "broken"]
    options = argparse.Namespace(threads=1, rounds=1, seconds=0.0)
    found = dict(peers.side_by_side(engines, case, options, lambda model: ("one", 1.0)))
    assert found["absent"] == {"problem": "ImportError: no such engine"}
    assert "calling it with example_inputs failed" in found["broken"]["problem"]
    assert found["eager"]["speedup"] == 1 and found["frozen"]["one"] == 1.0
    assert found["frozen"]["problem"] is None and found["frozen"]["latency_ms"] > 0


@pytest.mark.slow
def test_random_models_are_counted(monkeypatch, capsys):
    """An ordinary model, fused and pruned: nothing fails."""
    arguments = ["random_graphs.py", "--models", "1", "--first", "8", "--only", "fused", "pruned"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert random_graphs.main() == 0
    assert "fused      ok 1, refused 0, crash 0" in capsys.readouterr().out
