"""Measuring processes: how they are started, what can't be sent to them, how they fail."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import pytest
import torch
from measuring_models import (
    INPUTS,
    QUICK,
    OnlyHere,
    complain,
    die,
    leave,
    multiply,
    sleep_long,
    start_children_and_die,
    weight_sum,
)
from torch import nn

from quantize.checkpoint import save
from quantize.measuring import turns
from quantize.measuring.artifact import MeasurementError
from quantize.measuring.comparison import compare, measure
from quantize.measuring.process import Worker, pack, pack_inputs, payload
from quantize.native import int8

pytestmark = [pytest.mark.usefixtures("one_nursery"), pytest.mark.xdist_group("measuring")]


@pytest.mark.slow
def test_children_have_working_threads(files):
    """Matrix products on two threads run in a child: what it was forked from had no thread pool."""
    m = compare([files["mlp"]] * 2, INPUTS, evaluate=multiply, **{**QUICK, "threads": 2})
    assert all(x.metrics == {"product": 1.0} and x.notes == () for x in m)


def threads_of_a_large_layer(model) -> float:
    return float(int8.threads(1 << 40))


@pytest.mark.slow
def test_int8_layers_may_use_the_threads_of_a_measurement(files):
    """A child of the nursery isn't one whose parent has computed."""
    found = compare(
        [files["mlp"]], INPUTS, evaluate=threads_of_a_large_layer, **QUICK | {"threads": 2}
    )
    assert list(found[0].metrics.values()) == [2.0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.slow
def test_both_ways_of_starting(files, monkeypatch, start):
    """Where the system can't fork, each child is a Python of its own, and the rest is the same."""
    if start == "spawn":
        monkeypatch.delattr("os.fork", raising=False)
    m = measure(files["mlp"], INPUTS, evaluate=weight_sum, **QUICK)
    assert m.metrics["pid"] != os.getpid() and m.peak_rss_mb > 50 and m.notes == ()


@pytest.mark.slow
def test_peak_memory_is_the_workers_own(files):
    """A caller with 600 MB more resident doesn't show in its child's peak."""
    ballast = torch.ones(150_000_000)
    things = payload(example_inputs=pack_inputs(INPUTS))
    with (
        turns.Nursery(threads=1) as nursery,
        Worker(nursery, files["mlp"], things, name="mlp", keep=False, timeout_s=120) as worker,
    ):
        small = worker.peak_rss_mb()
    own = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert small < own - 0.5 * ballast.nbytes / 2**20


def test_a_fresh_instance_is_sent_without_its_weights(tmp_path):
    """The file has them; a buffer that no file has goes along, and the outputs are the model's."""
    model = nn.Sequential(nn.Linear(4, 512), nn.Linear(512, 512)).eval()
    model.register_buffer("shift", torch.ones(3), persistent=False)
    given = turns.Given(torch.ones(2, 4), None, model, 1)
    sent = pickle.loads(turns._packed(given)[0]["model"])
    assert all(parameter.is_meta for parameter in sent.parameters())
    assert torch.equal(sent.shift, model.shift) and not model[0].weight.is_meta
    save(model, tmp_path / "wide.pth")
    evaluate = lambda loaded: loaded(given.example_inputs).sum().item()  # noqa: E731
    row = measure(
        tmp_path / "wide.pth", given.example_inputs, model=model, evaluate=evaluate, **QUICK
    )
    assert row.metrics["metric"] == pytest.approx(evaluate(model), rel=1e-4)


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


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (die, "its process was killed by signal 9 during 'evaluate'"),
        (complain, "evaluate failed: RuntimeError: no such metric"),
        (sleep_long, "no answer to 'evaluate' within 0.2 s"),
    ],
)
@pytest.mark.slow
def test_failing_workers_are_named_and_reaped(files, evaluate, message):
    """A crash, an exception and a hang become one MeasurementError that names the file; the process
    is gone. That its nursery is too, `one_nursery` checks.
    """
    things, name = (
        payload(example_inputs=pack_inputs(INPUTS), evaluate=pack(evaluate)),
        str(files["mlp"]),
    )
    with (
        turns.Nursery(threads=1) as nursery,
        Worker(nursery, files["mlp"], things, name=name, keep=False, timeout_s=300) as worker,
    ):
        worker.load()
        worker.timeout_s = 0.2 if evaluate is sleep_long else 300
        with pytest.raises(MeasurementError, match=message) as caught:
            worker.evaluate()
    with pytest.raises(ProcessLookupError):
        os.kill(worker._process.pid, 0)
    assert str(files["mlp"]) in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(("evaluate", "code"), [(start_children_and_die, 7), (leave, 5)])
def test_a_death_is_seen_although_children_live(files, evaluate, code):
    """By its exit code, long before the time is up."""
    began = time.monotonic()
    with pytest.raises(
        MeasurementError, match=f"its process ended with exit code {code} during 'evaluate'"
    ):
        measure(files["mlp"], INPUTS, evaluate=evaluate, timeout_s=1000, **QUICK)
    assert time.monotonic() - began < 300
