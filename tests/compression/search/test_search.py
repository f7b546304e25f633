"""`compress`: what it promises of the point it returns, whatever the clock says.

Latencies are made up here (a fixed time per stored byte), so that every decision is repeatable;
files, losses and models are real.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import measured_by_bytes
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import quantize
from quantize import compress
from quantize.compression.recipe import Int8, LowRank, Prune, Recipe
from quantize.compression.search import strategy
from quantize.compression.search.budget import Budget
from quantize.compression.search.divergence import Divergence
from quantize.compression.search.judge import Evaluated
from quantize.compression.search.times import Stopwatch, made

INPUTS = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Sequential):
    """16 features to 4 classes, with room to prune."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
        )


@pytest.fixture
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 16, generator=generator) for _ in range(4)]


@pytest.fixture(autouse=True)
def by_bytes(monkeypatch, no_chart):
    """A nanosecond per byte of a file and of a layer's tensors; no processes, and no picture but
    where `test_commands` and `test_readme` search.
    """
    monkeypatch.setattr("quantize.compression.search.trial.compare", measured_by_bytes)
    monkeypatch.setattr("quantize.compression.search.finding.Nursery.launch", lambda _: None)
    monkeypatch.setattr(Stopwatch, "_race", timed_by_bytes)
    monkeypatch.setattr(Stopwatch, "share", share_by_bytes)
    monkeypatch.setattr("quantize.compression.search.walk.MOST_SHARES", 3)
    monkeypatch.setattr("quantize.compression.search.walk.MOST_STEPS", 40)


def timed_by_bytes(watch, layer, _shape):
    layers = {kind: made(layer, kind) for kind in watch.kinds}
    return {kind: seconds_by_bytes(one) for kind, one in layers.items()}


def share_by_bytes(_watch, model, _example_inputs, layers):
    return sum(map(seconds_by_bytes, layers)) / seconds_by_bytes(model)


def seconds_by_bytes(model):
    return 1e-9 * sum(tensor.nbytes for tensor in model.state_dict().values())


def search(model, batches, budget, **options):
    options = {"calibration": batches, "minutes": 5, "progress": False} | options
    return compress(model, INPUTS, budget=budget, **options)


def assert_preferred(chosen, others):
    """None has lost less by more than noise, and none that has lost no more is faster."""
    assert len(others) > 1
    for row in others:
        assert chosen["loss"] <= max(row["loss"], 0) + row["loss_noise"]
        assert row["loss"] > chosen["loss"] or row["speedup"] <= chosen["speedup"]


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        ({}, ValueError, "budget has"),
        ({"speed": 2}, ValueError, "budget has"),
        ("fast", TypeError, "must be a dict"),
        ({"speedup": 0}, ValueError, "speedup"),
        ({"bytes": math.inf}, ValueError, "bytes"),
        ({"latency_ms": True}, ValueError, "latency_ms"),
        ({"max_loss": -1}, ValueError, "max_loss"),
        ({"max_loss": "much"}, ValueError, "max_loss"),
    ],
)
def test_budgets_that_say_nothing_are_refused(budget, error, message, batches):
    """Before any work, naming what is wrong and what is allowed."""
    with pytest.raises(error, match=message):
        search(Net().eval(), batches, budget)


def test_a_loss_is_absolute_relative_or_in_noise():
    assert Budget.of({"max_loss": 0.5}).allowed_loss(8.0, 0.1) == 0.5
    assert Budget.of({"max_loss": "25%"}).allowed_loss(-8.0, 0.1) == 2.0
    assert Budget.of({"max_loss": "3 noise"}).allowed_loss(8.0, 0.1) == pytest.approx(0.3)
    assert Budget.of({"speedup": 2}).allowed_loss(8.0, 0.1) == math.inf


@given(st.floats(0.0, 0.94))
def test_halving_finds_the_edge(edge):
    """Whatever the largest share that is good, the shares tried come as near as is told apart."""
    tried = {}
    share = strategy.FIRST_SHARE
    while share is not None:
        tried[share] = share <= edge
        share = strategy.between(tried)
    good = max((s for s, fits in tried.items() if fits), default=0.0)
    assert good <= edge <= good + strategy.FINEST + 0.002 and len(tried) < 8


def test_divergence_is_zero_for_the_same_and_the_formula_for_another(batches):
    """KL divergence of classes, computed by hand."""
    model, other = Net().eval(), Net().eval()
    with torch.no_grad():
        other[-1].weight.mul_(1.5)
    judge = Divergence(model, batches)
    same = judge.score(model)
    assert same.loss == pytest.approx(0, abs=1e-9) and same.noise < 1e-9
    with torch.no_grad():
        p, q = (torch.cat([m(b) for b in batches]).softmax(-1) for m in (model, other))
    expected = (p * (p / q).log()).sum(-1).mean().item()
    assert judge.score(other).loss == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="not finite"):
        judge.score(nn.Sequential(model, nn.Hardtanh(math.nan, math.nan)))
    with pytest.raises(ValueError, match=r"\[32, 3\]"):
        judge.score(nn.Linear(16, 3))


def test_the_metric_decides_what_is_worse(batches):
    """Accuracy falls, an error rises; a metric that varies has noise; NaN is refused."""
    values = iter([0.9, 0.8, 0.7])
    judge = Evaluated(lambda model: {"accuracy": next(values)}, Net())
    score = judge.score(Net())
    assert score.loss == pytest.approx(0.2) and score.noise == pytest.approx(0.1)
    values = iter([2.0, 2.0, 2.5])
    assert Evaluated(lambda model: ("error", next(values)), Net()).score(Net()).loss == 0.5
    with pytest.raises(ValueError, match="for the original"):
        Evaluated(lambda model: math.nan, Net())


def test_a_target_is_reached_with_the_least_loss(batches, tmp_path):
    """Of all rows that keep the budget none has lost less; the file holds the model."""
    model = Net().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = search(model, batches, {"speedup": 3.2}, out=tmp_path)
    assert result.met and result.reason.startswith(result.file.stem)
    rows = {row["name"]: row for row in result.rows}
    chosen = rows[result.file.stem]
    assert chosen["speedup"] >= 3.2 and chosen["bytes"] == result.file.stat().st_size
    more = search(model, batches, {"speedup": 1.4}, out=tmp_path)
    other = next(row for row in more.rows if row["name"] == more.file.stem)
    assert all(row["seconds"] > 0 for row in more.rows[1:])  # measured once more or not
    assert_preferred(other, [row for row in more.rows if row["fits"] and row["speedup"] > 1.5])
    again = quantize.load(result.file, model=Net())
    assert torch.equal(again(INPUTS), result.model(INPUTS)) and not result.model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {"report.json", "report.md", "pareto.png"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_a_loss_alone_gives_the_fastest_within_it(batches, tmp_path):
    """Nothing within the loss is faster; what lost more is there, and says so."""
    result = search(Net().eval(), batches, {"max_loss": 0.001}, out=tmp_path)
    assert result.met
    within = [row for row in result.rows if row["within"]]
    chosen = next(row for row in result.rows if row["name"] == result.file.stem)
    assert chosen["speedup"] == max(row["speedup"] for row in within) > 1
    lost = [row for row in result.rows if row["file"] and not row["within"]]
    assert lost and all("the loss is" in row["misses"][-1] for row in lost)


@pytest.mark.slow
def test_what_cannot_be_met_is_said(batches, tmp_path):
    """The best that keeps the loss, and what is missing."""
    budget = {"speedup": 1000, "max_loss": 0.02}
    result = search(Net().eval(), batches, budget, out=tmp_path)
    assert not result.met and "speedup is" in result.reason and "asked for 1000" in result.reason
    chosen = next(row for row in result.rows if row["name"] == result.file.stem)
    assert chosen["within"]


@pytest.mark.slow
def test_an_interrupted_search_goes_on(batches, tmp_path, monkeypatch):
    """Stopped in the middle of a point, before and after the first rows: rows and files are kept,
    the rest is made, and the choice is that of a search that was never stopped. A damaged file is
    made again.
    """
    budget, made = {"speedup": 3.2}, []
    whole = search(Net().eval(), batches, budget, out=tmp_path / "whole")
    call = Recipe.__call__
    monkeypatch.setattr(Recipe, "__call__", lambda self, *a: made.append(self) or call(self, *a))
    for at, damaged in [(2, False), (2, True), (4, False)]:
        cut = tmp_path / f"cut at {at}, {damaged}"
        last = stopped_at(at, batches, budget, cut)
        if damaged:
            content = last.read_bytes()
            last.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        made.clear()
        resumed = search(Net().eval(), batches, budget, out=cut)
        assert resumed.file.name == whole.file.name
        told = ("name", "bytes", "loss", "fits", "recipe")
        for before, after in zip(whole.rows, resumed.rows, strict=True):
            assert [before[key] for key in told] == [after[key] for key in told]
        assert len(made) == len(whole.rows) - 1 - at + damaged
        with pytest.raises(ValueError, match="other calibration"):
            search(Net().eval(), batches[:2], budget, out=cut)


def stopped_at(at: int, batches, budget, out: Path) -> Path:
    """Ctrl-C in a search as it loads this file; which one that is."""
    calls, load = [], quantize.load

    def stopping(path, *args):
        calls.append(path)
        if len(calls) == at:
            raise KeyboardInterrupt
        return load(path, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantize.compression.search.trial.checkpoint.load", stopping)
        with pytest.raises(KeyboardInterrupt):
            search(Net().eval(), batches, budget, out=out)
    return calls[-1]


@pytest.mark.slow
def test_points_that_fail_are_rows(batches, tmp_path):
    """A model that can't be exported isn't pruned; what needs no graph still runs."""

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x):
            return self.net(x) if x.sum() > 0 else self.net(-x)

    result = search(Branching().eval(), batches, {"bytes": 2_000}, out=tmp_path)
    failed = [row for row in result.rows if row["file"] is None]
    assert any(row["name"].startswith("pruned") for row in failed)
    assert all(row["notes"].startswith("failed: ") and not row["fits"] for row in failed)
    sizes = {row["name"]: row["bytes"] for row in result.rows if row["file"]}
    assert not result.met and sizes[result.file.stem] == min(sizes.values())
    assert any(name.startswith("low_rank") for name in sizes)


@pytest.mark.slow
def test_a_metric_that_raises_for_compressed_models_leaves_the_original(batches, tmp_path):
    def accuracy(model):
        if type(model[0]) is not nn.Linear or model[0].out_features != 64:
            raise RuntimeError("not mine")
        return 0.9

    result = search(Net().eval(), batches, {"max_loss": 0.0}, evaluate=accuracy, out=tmp_path)
    failed = [row for row in result.rows if row["file"] is None]
    assert failed and all("not mine" in row["notes"] or row["notes"] for row in failed)
    assert result.met


def test_recipes_of_a_search_are_told_apart_by_their_files():
    """Two shares, two options: two names."""
    from quantize.compression.search.trial import file_name

    recipes = [
        Recipe((Prune(0.25),)),
        Recipe((Prune(0.5),)),
        Prune(0.5) >> Int8(),
        Prune(0.5) >> Int8(smooth=True),
        LowRank(0.5) >> Int8(),
    ]
    names = [file_name(recipe) for recipe in recipes]
    assert len(set(names)) == len(names) and names[2] == "pruned0.5+int8"


@pytest.mark.parametrize("minutes", [0, -1, math.nan, "5"])
def test_minutes_out_of_range(minutes, batches):
    with pytest.raises(ValueError, match="minutes"):
        search(Net().eval(), batches, {"speedup": 2}, minutes=minutes)
