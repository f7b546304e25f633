"""Measuring: metrics, latencies and fingerprints, without any process."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from measuring_models import INPUTS, Net

from quantize.measuring.artifact import Artifact, as_metrics, fingerprint, stored_tensors
from quantize.measuring.process import pack_inputs
from quantize.measuring.result import Measurement, latency_of
from quantize.measuring.turns import Turn, take_turns


def test_stored_tensors_counts_shared_weights_once():
    """Parameters and weights in buffers, without running statistics and non-persistent buffers."""
    assert sum(t.numel() for t in stored_tensors(Net())) == 336


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


@pytest.mark.parametrize("result", [None, {}, "good", (0.5, 0.6), torch.ones(0), torch.ones(2, 3)])
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

    def warm_up(self, seconds):
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
    artifact.warm_up(0.0)
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
