"""The stopwatch: turns, medians, one grad mode, and that there is no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quantize
from quantize import clock


class Script:
    """In the place of the module `time`: it goes on only where it is told to."""

    def __init__(self):
        self.now, self.pauses = 0.0, 0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.pauses += 1


def contenders(monkeypatch, *seconds):
    """Calls that take these seconds, the order in which they were called, and the time."""
    script, order = Script(), []
    left = [list(each) for each in seconds]

    def call(i):
        order.append(i)
        script.now += left[i].pop(0)

    monkeypatch.setattr(clock, "time", script)
    return [lambda i=i: call(i) for i in range(len(left))], order, script


def test_contenders_take_turns_and_the_median_counts(monkeypatch):
    """One interrupted call and the uncounted first ones don't show."""
    calls, order, _ = contenders(monkeypatch, [9, 1, 50, 1], [9, 2, 2, 2])
    assert clock.race(calls, least=3) == [1, 2]
    assert order == [0, 1] * 4


def test_turns_go_on_until_there_are_seconds_enough(monkeypatch):
    """A quick contender alone is called more often than `least`."""
    calls, order, _ = contenders(monkeypatch, [0.1] * 99)
    assert clock.race(calls, least=2, seconds=1.05, warm_up=0) == [pytest.approx(0.1)]
    assert len(order) == 11


def test_a_burst_is_woken_first(monkeypatch):
    """A pause and an uncounted call before each burst, which lasts for about its seconds."""
    calls, order, script = contenders(monkeypatch, [7, 1, 1, 8, 4, 9, 4], [7, 2, 7, 2, 7, 2])
    assert clock.race(calls, least=3, burst_s=2, warm_up=0) == [2.5, 2]
    assert order == [0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1]
    assert script.pauses == 6


def test_bursts_count_all_but_the_first_call(monkeypatch):
    """At least one call is counted, however long it takes."""
    calls, _, _ = contenders(monkeypatch, [9, 5], [9, 1, 1, 1])
    assert clock.burst(calls[0], 0.0) == [5]
    assert clock.burst(calls[1], 2.5) == [1, 1, 1]


def test_timed_as_users_run_it():
    """Without gradients but outside of inference mode, where int8 layers share what they have
    quantized.
    """
    modes = []

    def watched():
        modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    clock.race([watched], least=1, burst_s=1e-9)
    clock.burst(watched, 0.0)
    assert len(modes) >= 5 and set(modes) == {(False, False)}


def test_nothing_to_time_is_refused():
    """A median needs a call."""
    with pytest.raises(ValueError, match="least is 0; allowed"):
        clock.race([print], least=0)
    assert clock.race([]) == []


def test_no_other_stopwatch():
    """Only the pace of drafts, which is no comparison, reads the time itself."""
    package = Path(quantize.__file__).parent
    reads = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if "perf_counter" in path.read_text()
    }
    assert reads == {"clock.py", "run/generate/loop.py"}
