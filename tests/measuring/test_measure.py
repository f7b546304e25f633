"""Measuring: what is counted, fresh processes and what happens when they fail, the command line."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import quantize
from quantize.allocator import keep_allocations
from quantize.checkpoint import CheckpointError, save
from quantize.measuring.artifact import (
    Artifact,
    Build,
    MeasurementError,
    as_metrics,
    fingerprint,
    stored_tensors,
)
from quantize.measuring.comparison import compare, measure
from quantize.measuring.nursery import Nursery
from quantize.measuring.process import Worker, pack, pack_inputs, payload
from quantize.measuring.result import Measurement, latency_of
from quantize.measuring.turns import Turn, take_turns
from quantize.models import MLP, MLPConfig

QUICK = {"threads": 1, "rounds": 2, "burst_seconds": 0.0}
INPUTS = torch.linspace(-1, 1, 32).reshape(2, 16)


class Net(nn.Module):
    """A foreign architecture: two inputs, a tied weight, a BatchNorm, a weight kept in a buffer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(16, 16), nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.b.weight = self.a.weight
        self.register_buffer("table", torch.ones(16, dtype=torch.int8))
        self.register_buffer("mask", torch.ones(99), persistent=False)

    def forward(self, x, scale=1.0):
        return {"out": self.norm(self.b(self.a(x))) * self.table * scale}


def weight_sum(model, factor=1.0):
    return {
        "weight_sum": factor * model.state_dict()["head.weight"].double().sum().item(),
        "pid": os.getpid(),
    }


def die(model):
    os.kill(os.getpid(), signal.SIGKILL)


def complain(model):
    print("on standard output")
    raise RuntimeError("no such metric")


def sleep_long(model):
    time.sleep(60)


def leave_unread():
    raise AssertionError("this must run in the child only")


class OnlyHere:
    """Pickles here, and can't be read back anywhere."""

    def __reduce__(self):
        return leave_unread, ()

    def __call__(self, model):
        return 3.0


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    torch.manual_seed(0)
    model = MLP(MLPConfig(in_features=16, classes=4, hidden=(32,))).eval()
    paths = {"mlp": folder / "mlp.pth", "script": folder / "script.pt", "model": model}
    save(model, paths["mlp"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.freeze(torch.jit.trace(model, INPUTS)).save(str(paths["script"]))
    return paths


@pytest.fixture(scope="module")
def measured(files) -> list[Measurement]:
    artifacts = {"base": files["mlp"], "script": files["script"]}
    return compare(artifacts, INPUTS, evaluate=partial(weight_sum_or_zero, factor=2.0), **QUICK)


def weight_sum_or_zero(model, factor):
    return (
        weight_sum(model, factor)
        if isinstance(model, MLP)
        else {"weight_sum": 0.0, "pid": os.getpid()}
    )


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


def multiply(model):
    torch.ones(512, 512) @ torch.ones(
        512, 512
    )  # hangs in a child that was forked from a process with a thread pool
    return {"product": 1.0}


@pytest.mark.slow
def test_children_have_working_threads(files):
    """Matrix products on two threads run in a child: what it was forked from had no thread pool."""
    m = compare([files["mlp"]] * 2, INPUTS, evaluate=multiply, **{**QUICK, "threads": 2})
    assert all(x.metrics == {"product": 1.0} and x.notes == () for x in m)


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.slow
def test_both_ways_of_starting(files, monkeypatch, start):
    """Where the system can't fork, each child is a Python of its own, and the rest is the same."""
    if start == "spawn":
        monkeypatch.delattr("os.fork", raising=False)
    m = measure(files["mlp"], INPUTS, evaluate=weight_sum, **QUICK)
    assert m.metrics["pid"] != os.getpid() and m.peak_rss_mb > 50 and m.notes == ()


def test_a_nursery_that_dies_is_named(files, tmp_path, monkeypatch):
    """Its last words are in the message."""
    monkeypatch.setattr(sys.modules[Nursery.__module__], "_PACKAGE_PARENT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "")
    (tmp_path / "quantize").mkdir()
    (tmp_path / "quantize" / "__init__.py").write_text("raise ImportError('no torch here')")
    with pytest.raises(MeasurementError, match="ImportError: no torch here"):
        measure(files["mlp"], INPUTS, **QUICK)


@pytest.mark.slow
def test_peak_memory_is_the_workers_own(files):
    """A caller with 600 MB more resident doesn't show in its child's peak."""
    ballast = torch.ones(150_000_000)
    things = payload(example_inputs=pack_inputs(INPUTS))
    with (
        Nursery(threads=1) as nursery,
        Worker(nursery, files["mlp"], things, name="mlp", keep=False, timeout_s=120) as worker,
    ):
        small = worker.peak_rss_mb()
    own = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert small < own - 0.5 * ballast.nbytes / 2**20


@pytest.mark.slow
def test_a_foreign_architecture_is_measured_from_its_file(tmp_path):
    """`model=` goes to the fresh process; keyword inputs and dict outputs work."""
    save(Net().eval(), tmp_path / "net.safetensors")
    m = measure(tmp_path / "net.safetensors", {"x": INPUTS, "scale": 2.0}, model=Net, **QUICK)
    assert m.notes == () and m.peak_rss_mb and m.latency_ms.median > 0
    assert (
        m.parameters == 16 * 16 + 2 * 16 + 2 * 16 + 16
    )  # tied weight once, BatchNorm's statistics and the mask not


def test_stored_tensors_counts_shared_weights_once():
    """Parameters and weights in buffers, without running statistics and non-persistent buffers."""
    assert sum(t.numel() for t in stored_tensors(Net())) == 336


@pytest.mark.slow
def test_what_cannot_be_sent_is_evaluated_here_and_said(files):
    """An open file can't go to another process: the artifact is loaded here for it; notes and
    progress say so.
    """
    said = []
    with files["mlp"].open() as file:
        m = measure(
            files["mlp"],
            INPUTS,
            evaluate=lambda model: ("open", not file.closed),
            progress=said.append,
            **QUICK,
        )
    assert m.metrics == {"open": 1.0} and m.peak_rss_mb
    assert len(m.notes) == 1 and m.notes[0].startswith("evaluated in the calling process")
    assert f"mlp: {m.notes[0]}" in said


@pytest.mark.slow
def test_what_a_child_cannot_read_is_measured_here_and_said(files):
    """Pickling may work and unpickling fail; the numbers then come from the file in this
    process.
    """
    m = measure(files["mlp"], INPUTS, evaluate=OnlyHere(), **QUICK)
    assert (
        m.metrics == {"metric": 3.0} and m.peak_rss_mb is None and "calling process" in m.notes[0]
    )


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


class Numpy:
    """A second engine: reads a weight from a file and multiplies in NumPy."""

    def __init__(self, file):
        self.weight, self.pid = np.load(file), os.getpid()

    def __call__(self, x):
        return torch.from_numpy(x.numpy() @ self.weight)


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


def no_engine():
    raise ImportError("no such engine")


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


def score(model):
    if isinstance(model, nn.Identity):
        raise RuntimeError("no score")
    return 1.0


def test_without_inputs_a_built_in_model_is_still_timed(files):
    """The built-in models know what they take; others are measured without latency, and it is
    said.
    """
    assert measure(files["model"], None, **QUICK).latency_ms is not None
    m = measure(nn.Linear(2, 2), None, **QUICK)
    assert m.latency_ms is None and m.speedup is None and "latency not measured" in m.notes[-1]


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (die, "its process was killed by signal 9 during 'evaluate'"),
        (complain, "evaluate failed: RuntimeError: no such metric"),
        (sleep_long, "no answer to 'evaluate' within 2 s"),
    ],
)
@pytest.mark.slow
def test_failing_workers_are_named_and_reaped(files, evaluate, message):
    """A crash, an exception and a hang become one MeasurementError that names the file; no process
    is left.
    """
    things, name = (
        payload(example_inputs=pack_inputs(INPUTS), evaluate=pack(evaluate)),
        str(files["mlp"]),
    )
    with (
        Nursery(threads=1) as nursery,
        Worker(nursery, files["mlp"], things, name=name, keep=False, timeout_s=300) as worker,
    ):
        worker.load()
        worker.timeout_s = 2
        with pytest.raises(MeasurementError, match=message) as caught:
            worker.evaluate()
    with pytest.raises(ProcessLookupError):
        os.kill(worker._process.pid, 0)
    assert str(files["mlp"]) in str(caught.value)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_wrong_inputs_name_the_artifact(files):
    """What the model raises comes back as a MeasurementError."""
    with pytest.raises(
        MeasurementError, match=r"MLP: calling it with example_inputs failed: RuntimeError"
    ):
        measure(files["model"], torch.ones(2, 3), **QUICK)


@pytest.mark.slow
def test_bad_arguments_are_refused(files, tmp_path):
    """Each with its name and value, before any process is started."""
    with pytest.raises(ValueError, match="threads must be an integer of at least 1, got 0"):
        measure(files["mlp"], INPUTS, threads=0)
    with pytest.raises(ValueError, match="rounds must be an integer of at least 1, got 0"):
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


@pytest.mark.parametrize(
    ("result", "metrics"),
    [
        (0.5, {"metric": 0.5}),
        (("loss", torch.tensor(2.0)), {"loss": 2.0}),
        ({"a": 1, "b": np.float32(2)}, {"a": 1.0, "b": 2.0}),
    ],
)
def test_forms_of_a_metric(result, metrics):
    """A number, a pair, a dict; tensors and numpy numbers too."""
    assert as_metrics(result) == metrics


@pytest.mark.parametrize("result", [None, {}, "good", torch.ones(2)])
def test_what_is_no_metric_is_refused(result):
    """With the value in the message."""
    with pytest.raises(TypeError, match="evaluate must return a number"):
        as_metrics(result)


def test_a_row_does_not_contradict_itself():
    """speedup is the ratio of the medians shown, in every order of calls, and the median lies
    between p10 and p90.
    """
    generator = random.Random(0)
    for _ in range(200):
        rounds = generator.randrange(1, 6)
        times = [
            [generator.lognormvariate(0, 1) for _ in range(generator.randrange(1, 30))]
            for _ in range(2 * rounds)
        ]
        base, other = latency_of(times[:rounds]), latency_of(times[rounds:])
        assert base.p10 <= base.median <= base.p90 and other.p10 <= other.median <= other.p90
        artifacts = [Timed(times[:rounds]), Timed(times[rounds:])]
        rows = _measured(artifacts, rounds)
        assert [row.latency_ms for row in rows] == [base, other]
        assert rows[1].speedup == base.median / other.median and rows[0].speedup == 1


@pytest.mark.parametrize(
    ("bursts", "expected"),
    [
        ([[3.0]], (3.0, 3.0, 3.0)),
        ([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], (2.0, 1.0, 3.0)),
        ([[1.0] * 1000, [9.0], [9.0]], (9.0, 1.0, 9.0)),
        ([[5.0, 1.0], [2.0, 4.0], [3.0, 3.0]], (3.0, 1.0, 5.0)),
    ],
)
def test_each_round_weighs_the_same(bursts, expected):
    """However many calls fitted into it: one fast round among three is a third."""
    found = latency_of(bursts)
    assert (found.median, found.p10, found.p90) == expected
    assert found.calls == sum(map(len, bursts))


class Timed:
    """Stands for an artifact whose calls take what is written down."""

    def __init__(self, bursts):
        self.bursts, self.file = list(bursts), None

    def load(self):
        return {"bytes": 1, "parameters": 1, "load_s": None, "callable": True}

    def warm_up(self):
        return {}

    def burst(self, seconds):
        return self.bursts.pop(0)

    def evaluate(self):
        return {}


def _measured(artifacts: list[Timed], rounds: int) -> list[Measurement]:
    turns = [Turn(str(i), artifact, artifact, fresh=False) for i, artifact in enumerate(artifacts)]
    return take_turns(turns, rounds, 0.0, lambda line: None, threads=1)


@pytest.mark.parametrize(
    ("times", "busy"),
    [
        ([1.0] * 9 + [2.0], False),
        ([1.0] * 5 + [2.0] * 5, True),
        ([1.0, 1.4] * 5, False),
        ([1.0, 9.0], False),
    ],
)
def test_a_busy_machine_is_said(times, busy):
    """Times that moved by more than half, where there are enough of them to tell."""
    (row,) = _measured([Timed([times])], 1)
    assert [note.startswith("busy machine: p90 is 2.0 times p10") for note in row.notes] == [
        True
    ] * busy


def test_timed_as_users_run_it(files):
    """Without gradients but outside of inference mode, where int8 layers share what they have
    quantized.
    """
    modes = []

    def watched(x):
        modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return x

    artifact = Artifact(watched, INPUTS)
    artifact.load()
    artifact.warm_up()
    artifact.burst(0.0)
    assert set(modes) == {(False, False)}


def test_fingerprint_sees_a_single_bit():
    """Equal for equal bits, different for one changed bit, another dtype or shape; nested outputs
    count.
    """
    same = [fingerprint(lambda x: {"a": (x, 1)}, torch.ones(3)) for _ in range(2)]
    assert same[0] == same[1]
    other = torch.nextafter(torch.ones(3), torch.tensor([1.0, 1.0, 2.0]))
    variants = [
        torch.ones(3),
        other,
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(3, 1),
        torch.tensor(1.0),
    ]
    assert len({fingerprint(lambda x: x, v) for v in variants}) == len(variants)


def test_views_are_sent_without_their_storage():
    """One row of a large table isn't sent with the table."""
    assert len(pack_inputs({"x": torch.ones(10_000, 100)[3]})) < 5_000


def _environment() -> dict[str, str]:
    """As a user's shell would have it, with this checkout first."""
    return dict(os.environ, PYTHONPATH=str(Path(quantize.__file__).resolve().parents[1]))


def _command(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "quantize", "measure", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=300)


@pytest.mark.slow
def test_command_line_prints_one_json_line(files, tmp_path):
    """Standard output is one line of JSON, standard error is empty (no double import, no warnings),
    and the numbers agree.
    """
    np.save(tmp_path / "x.npy", INPUTS.numpy())
    result = _command(
        files["mlp"],
        "--inputs",
        tmp_path / "x.npy",
        "--threads",
        1,
        "--rounds",
        1,
        "--burst-seconds",
        0,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("\n") == 1
    line = json.loads(result.stdout)
    assert line["bytes"] == files["mlp"].stat().st_size and line["latency_ms"]["median"] > 0
    assert line["machine"]["threads"] == 1 and line["peak_rss_mb"] > 50
    assert line["output_sha256"] == fingerprint(files["model"], INPUTS)


@pytest.mark.slow
def test_command_line_names_a_missing_file(tmp_path):
    """Exit code 2, nothing on standard output, one line on standard error."""
    result = _command(tmp_path / "none.pth")
    assert (result.returncode, result.stdout) == (2, "")
    reason = f"{tmp_path / 'none.pth'}: no such file"
    assert result.stderr == f"quantize measure: error: {reason}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["FOLDER"], "is not a file"),
        (["GARBAGE"], "garbage.pth"),
        (["FILE", "--threads", "0"], "threads must be"),
        (["FILE", "--rounds", "many"], "--rounds"),
        (["FILE", "--evaluate", "nowhere:f"], "nowhere:f"),
        (["FILE", "--inputs", "x.txt"], "x.txt"),
        (["FILE", "--inputs", "none.npy"], "none.npy"),
        ([], "required: file"),
    ],
)
def test_mistakes_on_the_command_line(files, tmp_path, capsys, arguments, message):
    """One line each, exit code 2."""
    from quantize.measuring.command import main

    (tmp_path / "garbage.pth").write_bytes(b"PK\x03\x04 not a checkpoint")
    places = {
        "FOLDER": str(tmp_path),
        "FILE": str(files["mlp"]),
        "GARBAGE": str(tmp_path / "garbage.pth"),
    }
    code = main([places.get(a, a) for a in arguments])
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err
