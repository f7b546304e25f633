"""On how many threads calls run, and in which: without a server."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch
from helpers import decoder
from served_models import net

from quantize.host import default_threads
from quantize.run.serve import Settings, serve_model
from quantize.run.serve.batching import Compute
from quantize.run.serve.keeping import Keeper
from quantize.run.serve.metrics import Metrics
from quantize.run.serve.state import State
from quantize.run.serve.workers import MOST_WORKERS, fitting


def test_a_batch_gets_the_cores_that_no_other_worker_computes_on():
    """All of them alone, half beside one; a worker that has ended takes none; texts get a part."""
    metrics, models = Metrics(["net"], workers=3), [serve_model(net(), "net")]
    state = State(models, Settings(workers=2), metrics, Keeper())
    state.cores = 4
    assert metrics.busy() == 0 and state.batch_threads() == 4
    for row, threads in ((0, 4), (2, 2)):
        metrics.row = row
        metrics.computes(True)
        assert state.batch_threads() == threads
    metrics.forget(2)
    assert state.batch_threads() == 4
    fixed = State(models, Settings(workers=2, threads=3), metrics, Keeper())
    assert fixed.batch_threads() == fixed.text_threads == 3


@pytest.mark.parametrize(
    ("call_s", "alone_s", "busy", "team", "short"),
    [
        (0.001, 0.001, 1, False, True),
        (0.001, 0.003, 1, False, False),  # more threads answer sooner
        (0.001, 0.003, 1, True, True),  # the event loop has them
        (0.001, 0.003, 2, False, True),  # another worker has their cores
        (0.02, 0.02, 2, False, False),
    ],
)
def test_calls_are_short_where_other_threads_would_not_help(
    call_s: float, alone_s: float, busy: int, team: bool, short: bool
):
    """Such calls run in the event loop."""
    metrics = Metrics(["net"], workers=2)
    served = replace(serve_model(net(), "net"), call_s=call_s, alone_s=alone_s)
    state = State([served], Settings(workers=2), metrics, Keeper())
    state.cores = 2
    assert state.compute.team_here is served.is_short
    state.compute.team_here &= team
    for metrics.row in range(busy):
        metrics.computes(True)
    assert state.models["net"]._is_short() is short


@pytest.mark.parametrize(("all_short", "here"), [(True, [2, 1]), (False, [1, 1])])
def test_one_thread_alone_has_others_below_it(all_short: bool, here: list[int]):
    """The event loop where all calls are short, until `compute` has needed some."""
    before = torch.get_num_threads()

    async def work() -> list[int]:
        compute = Compute(all_short=all_short)
        first = compute.run_here(torch.get_num_threads, 2)
        assert await compute.run(torch.get_num_threads, 1) == 1
        assert await compute.run(torch.get_num_threads, 2) == 2
        return [first, compute.run_here(torch.get_num_threads, 2)]

    found = asyncio.run(work())
    torch.set_num_threads(before)
    assert found == here


def test_workers_that_nobody_asked_for():
    """One for each core; one in all where texts are written, or a call takes long."""
    text, small = serve_model(decoder(vocab_size=256), "lm"), serve_model(net(), "net")
    assert small.call_s > 0.0
    quick, slow = replace(small, call_s=0.001), replace(small, call_s=0.02)
    assert fitting([quick]) == min(MOST_WORKERS, default_threads())
    assert fitting([quick, slow]) == fitting([quick, text]) == 1
