"""Measuring: what is counted and timed of files, models and other engines."""

from __future__ import annotations

import os
from functools import partial

import numpy as np
import pytest
import torch
from measuring_models import (
    INPUTS,
    QUICK,
    Net,
    Numpy,
    no_engine,
    score,
    weight_sum,
    weight_sum_or_zero,
)
from torch import nn

from quantize.allocator import keep_allocations
from quantize.checkpoint import CheckpointError, save
from quantize.measuring.artifact import Build, MeasurementError, fingerprint
from quantize.measuring.comparison import compare, measure
from quantize.measuring.result import Measurement

pytestmark = [pytest.mark.usefixtures("one_nursery"), pytest.mark.xdist_group("measuring")]


@pytest.fixture(scope="module")
def measured(files) -> list[Measurement]:
    artifacts = {"base": files["mlp"], "script": files["script"]}
    return compare(artifacts, INPUTS, evaluate=partial(weight_sum_or_zero, factor=2.0), **QUICK)


def test_fresh_processes_give_the_outputs_of_the_model_that_was_saved(files, measured):
    """The artifact loaded elsewhere equals its in-memory twin bit for bit, and has a process of its
    own.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert measured[0].output_sha256 == fingerprint(files["model"], INPUTS)
    torch.set_num_threads(before)
    assert len({m.metrics["pid"] for m in measured} | {os.getpid()}) == 3


def test_everything_is_measured(files, measured):
    """Size from the disk, all weights (frozen TorchScript constants too), ordered percentiles, a
    metric from the worker.
    """
    parameters = sum(p.numel() for p in files["model"].parameters())
    for m, path in zip(measured, (files["mlp"], files["script"]), strict=True):
        assert (m.bytes, m.parameters) == (path.stat().st_size, parameters)
        assert 0 < m.latency_ms.p10 <= m.latency_ms.median <= m.latency_ms.p90
        assert m.load_s > 0 and m.speedup > 0 and m.threads == 1 and m.notes == ()
        assert m.peak_rss_mb > 50
    assert measured[0].speedup == 1
    assert measured[0].metrics["weight_sum"] == weight_sum(files["model"], 2.0)["weight_sum"]
    assert "keeps large blocks" in measured[0].allocator or not keep_allocations()


@pytest.mark.slow
def test_a_foreign_architecture_is_measured_from_its_file(tmp_path):
    """`model=` goes to the fresh process; keyword inputs and dict outputs work."""
    save(Net().eval(), tmp_path / "net.safetensors")
    m = measure(tmp_path / "net.safetensors", {"x": INPUTS, "scale": 2.0}, model=Net, **QUICK)
    assert m.notes == () and m.peak_rss_mb and m.latency_ms.median > 0
    # tied weight once, BatchNorm's statistics and the mask not
    assert m.parameters == 16 * 16 + 2 * 16 + 2 * 16 + 16


@pytest.mark.slow
def test_a_model_in_memory_is_not_touched(files):
    """Measured on a copy in a fresh process, in eval mode, and the notes say that it is no
    artifact.
    """
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5)).train()
    keys = set(model.__dict__)
    m = measure(
        model, INPUTS, evaluate=lambda copy: {"on": copy.training, "pid": os.getpid()}, **QUICK
    )
    assert model.training and model[1].training and set(model.__dict__) == keys
    assert (
        m.metrics["on"] == 0
        and m.metrics["pid"] != os.getpid()
        and m.file is None
        and m.bytes == 4 * m.parameters == 4 * 272
    )
    assert "in memory" in m.notes[0]


@pytest.mark.slow
def test_another_engine_is_built_in_its_own_process(files, tmp_path):
    """Beside a file: the size of the file that it opens, its load time, its outputs, its metric; it
    has no parameters that are known.
    """
    weight = torch.linspace(-1, 1, 64).reshape(16, 4)
    np.save(tmp_path / "weight.npy", weight.numpy())
    artifacts = {"mlp": files["mlp"], "numpy": Build(Numpy, tmp_path / "weight.npy")}
    pids = lambda model: {"pid": getattr(model, "pid", 0)}  # noqa: E731
    base, other = compare(artifacts, INPUTS, evaluate=pids, **QUICK)
    assert base.metrics == {"pid": 0} and other.metrics["pid"] not in (0, os.getpid())
    assert other.output_sha256 == fingerprint(Numpy(tmp_path / "weight.npy"), INPUTS)
    assert other.file == str(tmp_path / "weight.npy") and other.notes == ()
    assert (other.bytes, other.parameters) == ((tmp_path / "weight.npy").stat().st_size, None)
    assert other.load_s > 0 and other.peak_rss_mb > 50
    assert other.speedup == base.latency_ms.median / other.latency_ms.median


@pytest.mark.slow
def test_a_module_can_be_built_too():
    """In eval mode; without a file its size is that of its tensors, without a module unknown."""
    builds = [Build(lambda: nn.Sequential(nn.Linear(16, 4), nn.Dropout(0.5))), Build(lambda: abs)]
    model, function = compare(builds, INPUTS, evaluate=lambda m: getattr(m, "training", 2), **QUICK)
    assert (model.parameters, model.bytes, model.metrics["metric"]) == (68, 272, 0)
    assert (function.parameters, function.bytes, function.metrics["metric"]) == (None, None, 2)
    assert [model.name, function.name] == ["Build", "Build (2)"] and model.notes == ()


@pytest.mark.slow
def test_one_that_fails_can_be_left_out(files, tmp_path):
    """With its reason, wherever it fails; the others are measured, and the baseline's error is
    raised as ever.
    """
    artifacts = {
        "base": files["mlp"], "absent": Build(no_engine), "other": files["script"],
        "narrow": nn.Linear(3, 3), "unscored": nn.Identity(), "gone": tmp_path / "gone.pth",
    }  # fmt: skip
    options = {"keep_going": True, **QUICK}
    found = compare(artifacts, INPUTS, evaluate=score, **options)
    base, absent, other, narrow, unscored, gone = found
    assert base.failed is None and other.failed is None and other.speedup > 0
    assert "building it failed: ImportError: no such engine" in absent.failed
    assert "calling it with example_inputs failed" in narrow.failed
    assert "evaluate failed: RuntimeError: no score" in unscored.failed
    assert gone.failed == f"{tmp_path / 'gone.pth'}: no such file"
    assert (absent.latency_ms, absent.bytes, absent.metrics, absent.notes) == (None, None, {}, ())
    with pytest.raises(MeasurementError, match="no such engine"):
        compare({"absent": Build(no_engine), "base": files["mlp"]}, INPUTS, **options)
    with pytest.raises(MeasurementError, match="no such engine"):
        compare({"base": files["mlp"], "absent": Build(no_engine)}, INPUTS, **QUICK)


@pytest.mark.slow
def test_without_inputs_a_built_in_model_is_still_timed(files):
    """The built-in models know what they take; others are measured without latency, and it is
    said.
    """
    assert measure(files["model"], None, **QUICK).latency_ms is not None
    m = measure(nn.Linear(2, 2), None, **QUICK)
    assert m.latency_ms is None and m.speedup is None and "latency not measured" in m.notes[-1]


def test_wrong_inputs_name_the_artifact(files):
    """What the model raises comes back as a MeasurementError."""
    with pytest.raises(
        MeasurementError, match=r"MLP: calling it with example_inputs failed: RuntimeError"
    ):
        measure(files["model"], torch.ones(2, 3), **QUICK)


@pytest.mark.slow
def test_bad_arguments_are_refused(files, tmp_path):
    """Each with its name and value, before any process is started."""
    with pytest.raises(ValueError, match="threads is 0; allowed: an integer >= 1"):
        measure(files["mlp"], INPUTS, threads=0)
    with pytest.raises(ValueError, match="rounds is 0; allowed: an integer >= 1"):
        measure(files["mlp"], INPUTS, rounds=0)
    with pytest.raises(ValueError, match="timeout_s"):
        measure(files["mlp"], INPUTS, timeout_s=-1)
    with pytest.raises(ValueError, match="burst_seconds"):
        measure(files["mlp"], INPUTS, burst_seconds=float("nan"))
    message = "artifact '7' must be a path, a model or a Build of a function, got int"
    with pytest.raises(TypeError, match=message):
        compare({"7": 7}, INPUTS)
    with pytest.raises(TypeError, match=message):
        compare({"7": Build(7)}, INPUTS)
    with pytest.raises(ValueError, match="artifacts is empty"):
        compare([], INPUTS)
    with pytest.raises(CheckpointError, match="no such file"):
        measure(tmp_path / "missing.pth", INPUTS)
    with pytest.raises(CheckpointError, match="no such file"):
        measure(Build(np.load, tmp_path / "missing.npy"), INPUTS)


def test_files_of_one_name_stay_apart(files, tmp_path):
    """Two artifacts with the same stem are both measured."""
    results = compare([files["model"], files["model"]], INPUTS, **QUICK)
    assert [m.name for m in results] == ["MLP", "MLP (2)"]
