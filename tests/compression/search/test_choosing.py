"""Which measured point is preferred, and which choice is made next once the targets are reached."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from quantize.compression.recipe import Int8, Prune, Recipe
from quantize.compression.search.budget import Budget
from quantize.compression.search.choosing import best
from quantize.compression.search.layered import Layered
from quantize.compression.search.options import Option, Unit
from quantize.compression.search.result import facts_of
from quantize.compression.search.times import FLOAT, INT4, INT8
from quantize.compression.search.walk import FIRST_STEPS, Walk

NOISE = 0.02  # of a speed-up
TIMED = {
    "speedup": 1.0,
    "latency_ms": {"median": 10.0},
    "latency_in_turns_ms": 10.0,
    "peak_rss_mb": 100.0,
}


def row(name: str, speedup: float, loss: float, noise: float = 0.001, size: int = 100) -> dict:
    """A measured point that is within every loss."""
    facts = {"name": name, "speedup": speedup, "loss": loss, "loss_noise": noise, "bytes": size}
    timed = {"latency_in_turns_ms": 10 / speedup, "peak_rss_mb": 100.0}
    return facts | timed | {"within": True, "fits": True}


def names(rows: list[dict[str, Any]], **budget: float) -> list[str]:
    return [one["name"] for one in best(rows, Budget.of(budget), NOISE)]


def test_the_fastest_of_those_that_lost_the_same_is_preferred():
    """Losses that differ by less than noise are the same; a larger one comes later, fast or not."""
    rows = [row("slow", 1.6, 0.0002), row("fast", 3.0, 0.0006), row("worse", 9.0, 0.0100)]
    assert names(rows, speedup=1.5) == ["fast", "slow", "worse"]
    assert names(rows, max_loss=1.0) == ["worse", "fast", "slow"]


def test_a_point_that_is_surely_better_is_not_held_to_its_noise():
    """It gained ten times what it may be off by; a small known loss isn't preferred to that."""
    rows = [row("rounded", 2.5, 0.0002, 0.0001), row("pruned", 3.4, -0.0109, 0.0036)]
    assert names(rows, speedup=1.5) == ["pruned", "rounded"]
    rows = [row("rounded", 2.5, 0.0002, 0.0001), row("unsure", 3.4, 0.0035, 0.0036)]
    assert names(rows, speedup=1.5) == ["rounded", "unsure"]


def test_the_latency_that_is_told_is_the_one_that_counts():
    """By turns with the original, not that of a moment in which the machine was busy."""
    told = facts_of(row("int8", 2.0, 0.0) | {"latency_ms": {"median": 99.0}})
    assert told == "5 ms (2.00x), 100 bytes, loss 0"


def test_what_is_slower_than_the_original_comes_last():
    """Even behind a point that loses more, and one that reaches the target by less than noise."""
    slower, lossy = row("int4", 0.7, 0.0, size=20), row("pruned", 3.0, 0.5, size=30)
    assert names([slower, lossy], bytes=40) == ["pruned", "int4"]
    near = row("near", 2.01, 0.0)
    assert names([near, row("sure", 2.5, 0.4), slower], speedup=2.0) == ["sure", "near", "int4"]


def narrower(amount: float, **values: Any) -> Option:
    """An int8 layer of 10 ms with fewer channels."""
    return Option(INT8, amount, kind_s=0.006, rounding=0.001, **values)


@pytest.fixture
def unit() -> Unit:
    """10 ms and 100 bytes; int4 is small and slow, half of the channels small, fast and lossy."""
    options = (
        Option(FLOAT, bytes={"net": 100.0}),
        Option(INT8, kind_s=0.006, rounding=0.001, bytes={"net": 26.0}),
        Option(INT4, kind_s=-0.005, rounding=0.002, bytes={"net": 15.0}),
        narrower(0.25, size_s=0.001, removal=0.004, bytes={"net": 19.0}),
        narrower(0.50, size_s=0.002, removal=0.400, bytes={"net": 13.0}),
    )
    return Unit("net", ("net",), options, 0.010)


def chosen(unit: Unit, spare: float | None = None, **budget: float) -> Option:
    original = TIMED | {"bytes": 100}
    layered = Layered([unit], original, Budget.of(budget), 1.0, False, True)
    choice = layered.choose(spare)
    assert choice is not None
    return layered.options(choice)[0]


def test_bytes_alone_are_not_reached_by_something_slower(unit):
    """Four bits lose less, but removal reaches the bytes too; where only four bits do, they are
    tried.
    """
    assert (chosen(unit, bytes=17).kind, chosen(unit, bytes=17).amount) == (INT8, 0.5)
    without = Unit(unit.name, unit.layers, unit.options[:4], unit.seconds)
    assert chosen(without, bytes=17).kind == INT4


def test_targets_that_are_reached_leave_room_for_speed(unit):
    """Within the spare loss the fastest that is small enough; without one, what loses least."""
    assert (chosen(unit, speedup=2.0).kind, chosen(unit, speedup=2.0).amount) == (INT8, 0.0)
    assert chosen(unit, spare=0.01, speedup=2.0).amount == 0.25
    assert chosen(unit, spare=0.01, bytes=30).amount == 0.25
    assert chosen(unit, spare=1.00, bytes=30).amount == 0.5
    assert chosen(unit, spare=0.0015, speedup=2.0).amount == 0.0


def test_layers_whose_inputs_go_are_no_pairs():
    """Both would save most, but of a narrower layer a small ratio may leave no rank."""
    whole = Option(FLOAT)
    narrow = Option(FLOAT, 0.5, size_s=0.003, reader_left={"second": 0.5})
    pair = Option(FLOAT, ratio=0.1, size_s=0.003)
    first = Unit("first", ("first",), (whole, narrow), 0.005)
    second = Unit("second", ("second",), (whole, pair), 0.005)
    original = TIMED | {"bytes": 200}
    layered = Layered([first, second], original, Budget.of({"max_loss": 1}), 1.0, False, True)
    assert layered.choose() == (1, 0)
    alone = Layered([second], original, Budget.of({"max_loss": 1}), 1.0, False, True)
    assert alone.choose() == (1,)


def test_what_goes_by_inputs_and_by_outputs_is_counted_once():
    """A layer of 5 ms and 100 bytes that keeps half of both takes a quarter: it saves 3.75 ms, not
    5, and has 25 bytes.
    """
    halved = {"reader_s": {"second": 0.0025}, "reader_left": {"second": 0.5}}
    narrow = Option(FLOAT, 0.5, size_s=0.0025 + 0.0025, bytes={"first": 50.0}, **halved)
    last = Option(FLOAT, 0.5, size_s=0.0025, bytes={"second": 50.0})
    first = Option(FLOAT, bytes={"first": 100.0})
    second = Option(FLOAT, bytes={"second": 100.0})
    first = Unit("first", ("first",), (first, narrow), 0.005)
    second = Unit("second", ("second",), (second, last), 0.005)
    original = TIMED | {"bytes": 200}
    layered = Layered([first, second], original, Budget.of({"speedup": 2}), 1.0, False, True)
    parts = {choice: layered.parts(choice) for choice in ((1, 0), (1, 1))}
    saved = {choice: one.size_s["float width"] for choice, one in parts.items()}
    assert saved == pytest.approx({(1, 0): 0.005, (1, 1): 0.0025 + 0.00375})
    assert (parts[1, 0].bytes, parts[1, 1].bytes) == (50 + 50, 50 + 25)


@pytest.mark.parametrize(
    ("speed", "small_wanted", "name"),
    [(1.5, False, "int8"), (0.6, False, None), (0.6, True, "int8")],
)
def test_smaller_models_are_not_rounded_where_that_is_slower(speed, small_wanted, name):
    """int8 that slows a model down is put behind other steps for its bytes only."""
    plain = {"recipe": Recipe((Int8(),)).to_json(), "within": True, "speedup": speed, "bytes": 10}
    walk = SimpleNamespace(plain=[plain], small_wanted=small_wanted, noise=0.02)
    tail = Walk._tail(walk)
    assert name == (None if tail is None else tail.name)


@pytest.mark.parametrize(("seconds", "steps"), [(1.0, 140), (2.0, 70), (5.0, None)])
def test_a_training_takes_no_longer_than_is_left(seconds, steps, monkeypatch):
    """By what its first steps took, which an earlier search may have made in no time."""
    recipe = Prune(0.5) >> Int8()
    row = {"recipe": recipe.as_values(), "file": "first.safetensors", "seconds": seconds}
    tried = []
    walk = object.__new__(Walk)
    walk.deadline = time.monotonic() + 10.0
    monkeypatch.setattr(walk, "_losing", lambda: [row])
    monkeypatch.setattr(walk, "_try", lambda one: tried.append(one.steps[1].steps) or row)
    walk._recover()
    more = [] if steps is None else [pytest.approx(steps, abs=1)]
    assert tried == [FIRST_STEPS, *more]
