"""How long layers are told to take: each shape is timed once, whatever asks for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantize.compression.search.times import BF16, FLOAT, INT8, Stopwatch


def test_layers_of_one_shape_are_timed_once(monkeypatch):
    """Two layers that differ in their weights alone, and one of another width."""
    made = []
    monkeypatch.setattr(Stopwatch, "_race", lambda self, layer, shape: made.append(shape) or {})
    watch = Stopwatch([FLOAT])
    for layer in (nn.Linear(8, 4), nn.Linear(8, 4)):
        watch.whole(layer, (3, 8), 8, 4)
    watch.whole(nn.Linear(8, 4), (3, 8), 6, 4)
    assert [tuple(shape) for shape in made] == [(3, 8), (3, 6)]


def test_a_busy_moment_is_not_taken_for_a_slow_layer(monkeypatch):
    """A layer takes no more for a product than one of half its size, in the same kind; one of other
    inputs, and one of a tenth, say nothing of it.
    """
    times = {(8, 8): 9.0, (8, 4): 2.0, (4, 4): 0.9, (1, 1): 0.0}
    monkeypatch.setattr(Stopwatch, "_race", lambda self, layer, shape: raced(layer, shape))

    def raced(layer, shape):
        seconds = times[layer.in_features, layer.out_features] * shape[0]
        return {FLOAT: seconds, INT8: 1.0}

    watch = Stopwatch([FLOAT, INT8])
    layer = nn.Linear(8, 8)
    few, many = ({size: watch.whole(layer, (n, 8), *size) for size in times} for n in (1, 2))
    watch.settle()
    settled = times | {(8, 8): 4.0, (8, 4): 1.8}
    assert few == {size: {FLOAT: seconds, INT8: 1.0} for size, seconds in settled.items()}
    assert many[8, 8][FLOAT] == 8.0


def test_what_lies_between_layers_is_no_part_of_their_share(monkeypatch):
    """A call of 2 + 1 + 3 made-up seconds, of which two layers that are asked for take 5; no hook
    is left.
    """
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    class Slow(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds = seconds

        def forward(self, x):
            now[0] += self.seconds
            return x

    model = nn.Sequential(Slow(2.0), Slow(1.0), Slow(3.0))
    watch = Stopwatch([FLOAT])
    assert watch.share(model, torch.ones(1), [model[0], model[2]]) == pytest.approx(5 / 6)
    assert watch.share(model, torch.ones(1), [model[1]]) == pytest.approx(1 / 6)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model)


@pytest.mark.slow
def test_the_real_stopwatch_gives_seconds():
    """Of linear layers, pairs and convolutions in each kind: positive, more for more rows."""
    kinds = (FLOAT, INT8, BF16)
    watch = Stopwatch(kinds)
    few = watch.whole(nn.Linear(64, 64), (1, 64), 64, 64)
    many = watch.whole(nn.Linear(64, 64), (4096, 64), 64, 64)
    assert set(few) == set(kinds) and all(many[kind] > few[kind] > 0 for kind in kinds)
    assert all(t > 0 for t in watch.pair(nn.Linear(64, 64), (8, 64), 8).values())
    convolution = nn.Conv2d(8, 16, 3, padding=1)
    assert all(t > 0 for t in watch.whole(convolution, (2, 8, 16, 16), 8, 8).values())
