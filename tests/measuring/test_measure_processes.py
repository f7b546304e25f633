"""What becomes of measuring processes: nothing outlives the caller, nothing holds its result
back.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import uuid
from functools import partial
from pathlib import Path

import pytest
import torch
from fresh import ended, python, started
from measuring_models import measure_without_end, start_children_and_answer
from torch import nn

from quantize.checkpoint import save
from quantize.measuring.artifact import MeasurementError
from quantize.measuring.comparison import compare, measure
from quantize.measuring.nursery import Nursery, modules_of
from quantize.models import MLP, MLPConfig

linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")

QUICK = {"threads": 1, "rounds": 1, "burst_seconds": 0.0}
INPUTS = torch.linspace(-1, 1, 32).reshape(2, 16)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "mlp.pth"
    save(MLP(MLPConfig(in_features=16, classes=4, hidden=(32,))).eval(), path)
    return path


def processes(mark: str) -> list[int]:
    """All that have `mark` in the environment that they were started with."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in environ.read_bytes():
                found.append(int(environ.parent.name))
        except OSError:  # ended, or somebody else's
            continue
    return found


def wait_until(condition, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(condition())


@linux
@pytest.mark.slow
@pytest.mark.xdist_group("fresh")
@pytest.mark.parametrize(
    ("how", "spawn"), [(signal.SIGKILL, False), (signal.SIGINT, False), (signal.SIGTERM, True)]
)
def test_nothing_outlives_the_caller(file, tmp_path, how, spawn):
    """However the caller ends while a worker computes: no process of its is left, and no file."""
    mark, hanging, folder = uuid.uuid4().hex, tmp_path / "hanging", tmp_path / "temporary"
    folder.mkdir()

    environment = {
        "QUANTIZE_TEST_MARK": mark,
        "QUANTIZE_TEST_STARTED": str(hanging),
        "TMPDIR": str(folder),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    caller = started(measure_without_end, file, environment, spawn)
    assert wait_until(hanging.exists) and len(processes(mark)) >= 3  # beside the caller
    os.kill(caller.pid, how)
    assert ended(caller) == (1 if how == signal.SIGINT else -how)
    escaped = 1 if spawn else 0  # without a nursery nobody hears of what left the worker's group
    try:
        assert wait_until(lambda: len(processes(mark)) <= escaped, 20), processes(mark)
    finally:
        for pid in processes(mark):
            os.kill(pid, signal.SIGKILL)
    assert list(folder.iterdir()) == []


@linux
@pytest.mark.slow
def test_children_of_evaluate_hold_nothing_back(file, monkeypatch):
    """The result comes while they run, also when they hold the worker's pipes; then they are
    ended.
    """
    mark = uuid.uuid4().hex
    monkeypatch.setenv("QUANTIZE_TEST_MARK", mark)
    began = time.monotonic()
    result = measure(file, INPUTS, evaluate=start_children_and_answer, **QUICK)
    assert result.metrics == {"metric": 3.0} and time.monotonic() - began < 300
    assert wait_until(lambda: not processes(mark), 20), processes(mark)


def kill_parent(model) -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)


@linux
@pytest.mark.slow
def test_workers_die_with_the_process_that_forked_them(file, monkeypatch):
    """The caller is told, and no worker is left."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv("QUANTIZE_TEST_MARK", mark)
    with pytest.raises(
        MeasurementError, match="the process that starts the measuring processes has failed"
    ):
        compare({"a": file, "b": file}, INPUTS, evaluate=kill_parent, **QUICK)
    assert wait_until(lambda: not processes(mark), 20)


def test_a_nursery_that_dies_is_named(file, tmp_path, monkeypatch):
    """Its last words are in the message."""
    monkeypatch.setattr(sys.modules[Nursery.__module__], "_PACKAGE_PARENT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "")
    (tmp_path / "quantize").mkdir()
    (tmp_path / "quantize" / "__init__.py").write_text("raise ImportError('no torch here')")
    with pytest.raises(MeasurementError, match="ImportError: no torch here"):
        measure(file, INPUTS, **QUICK)


def nap(model, seconds: float) -> float:
    time.sleep(seconds)
    return 1.0


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_the_limit_counts_work_and_not_the_start(file, monkeypatch, start):
    """Two seconds are less than a Python with torch needs to start here, and enough for all but the
    last answer.
    """
    if start == "spawn":
        monkeypatch.delattr("os.fork")
    with pytest.raises(MeasurementError, match="no answer to 'evaluate' within 2 s"):
        measure(file, INPUTS, evaluate=partial(nap, seconds=100.0), timeout_s=2.0, **QUICK)


SCRIPT = """
import os
import sys

import torch
from torch import nn

import quantize
from quantize.measuring import compare

WIDTH = 5  # a global that both use


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, WIDTH)

    def forward(self, x):
        return self.layer(x)


def width(model):
    return {"width": model.layer.out_features - WIDTH, "pid": os.getpid()}


torch.manual_seed(0)
model = Net().eval()
quantize.save(model, sys.argv[1])
rows = compare(
    {"file": sys.argv[1], "memory": model}, torch.zeros(2, 16), model=Net,
    evaluate=lambda m: width(m),
    threads=1, rounds=1, burst_seconds=0.0,
)
assert len({os.getpid(), *(row.metrics["pid"] for row in rows)}) == 3
assert [row.metrics["width"] for row in rows] == [0, 0]
assert rows[0].output_sha256 == rows[1].output_sha256
print([row.notes for row in rows])
"""


@pytest.mark.slow
@pytest.mark.xdist_group("fresh")
def test_what_the_script_defines_is_measured_in_a_fresh_process(tmp_path):
    """A class, a function and a lambda of a script without a main guard: processes of their own,
    and the script runs once.
    """
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = python(script, tmp_path / "net.safetensors", where=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "[(), ('in memory: no file was loaded',)]\n"


def has_wave(model) -> float:
    return float("wave" in sys.modules)


@pytest.mark.slow
def test_children_have_what_their_nursery_has_imported(file):
    """One nursery serves several comparisons; a module that isn't there is no error of its own."""
    with Nursery(threads=1, modules=("wave", "no.such.module")) as nursery:
        for _ in range(2):
            found = compare({"a": file}, INPUTS, evaluate=has_wave, nursery=nursery, **QUICK)
            assert list(found[0].metrics.values()) == [1.0]


def test_only_installed_packages_are_imported_before():
    """Classes of the caller's own files may compute when they are imported."""

    class Own(nn.Module):
        pass

    found = modules_of(nn.Sequential(nn.Linear(2, 2), Own()), lambda x: x, None)
    assert "torch.nn.modules.linear" in found and Own.__module__ not in found
