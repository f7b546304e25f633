"""`compress` with what goes wrong: metrics that fail, vary or take long, calibration that doesn't
fit, a full disk, a busy machine. Latencies are made up, as in `test_search`.
"""

from __future__ import annotations

import errno
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from compression.search.test_search import Net, assert_preferred, batches, by_bytes, search
from helpers import measured_by_bytes
from torch import Tensor, nn

from quantize import checkpoint, compress
from quantize.compression.recipe import Recipe
from quantize.compression.search.judge import Divergence, Evaluated
from quantize.compression.search.trial import FIRST_ROUNDS, HOPELESS_ROUNDS
from quantize.measuring.artifact import as_metrics, per_example

__all__ = ["batches", "by_bytes"]  # fixtures for the tests here


def values_of(model: nn.Module) -> Tensor:
    """A value for each of 500 examples, about 1, and 0.1 more for models without a first layer of
    64 outputs.
    """
    generator = torch.Generator().manual_seed(0)
    shift = 0.0 if getattr(model[0], "out_features", 0) == 64 else 0.1
    return 1 + torch.randn(500, generator=generator) + shift


def test_values_of_examples_tell_the_noise():
    """The mean counts. Its noise, and that of a difference example by example, are what resampling
    the examples gives.
    """
    first = values_of(Net())
    second = first + 0.1 + 0.05 * torch.randn(500, generator=torch.Generator().manual_seed(1))
    answers = iter([first, first, second])
    judge = Evaluated(lambda model: {"error": next(answers)}, Net())
    score = judge.score(Net())
    assert judge.value == pytest.approx(first.double().mean().item())
    assert score.loss == pytest.approx((second - first).double().mean().item(), rel=1e-5)
    drawn = np.random.default_rng(0).integers(0, 500, (4000, 500))
    for noise, values in ((judge.noise, first), (score.noise, second - first)):
        assert noise == pytest.approx(values.numpy()[drawn].mean(1).std(), rel=0.05)
    assert score.noise < judge.noise / 10


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_values_come_as_lists_arrays_and_tensors(kind):
    """Booleans too; the other metrics of a dict stay numbers."""
    metrics = as_metrics({"accuracy": kind([True, False, True, True]), "loss": 0.5})
    assert metrics["accuracy"] == 0.75 and metrics["loss"] == 0.5 and metrics["examples"] == 4
    assert metrics["standard_error"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    each = per_example(("accuracy", kind([1.0, 0.0])))
    assert each is not None and each.tolist() == [1, 0] and per_example(0.5) is None
    with pytest.raises(TypeError, match="one for each example"):
        as_metrics({"accuracy": kind([])})


def agreement(model: nn.Module) -> float:
    """Share of answers that are the original's: a bare number, better when higher."""
    inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(3))
    same = model(inputs).argmax(-1) == Net()(inputs).argmax(-1)
    return same.double().mean().item()


@pytest.mark.parametrize("evaluate", [agreement, lambda model: agreement(model)])
def test_a_bare_number_gets_worse_as_its_name_or_a_shuffled_copy_says(evaluate):
    """Fewer right answers are a loss, though "metric" doesn't say so; more errors are one too."""
    worse = Net()
    nn.init.zeros_(worse[0].weight)
    lost = 1 - agreement(worse)
    assert lost > 0
    assert Evaluated(evaluate, Net()).score(worse).loss == pytest.approx(lost)
    errors = Evaluated(lambda model: 1 - evaluate(model), Net())
    assert errors.score(worse).loss == pytest.approx(lost)


def test_a_number_of_which_nothing_says_what_is_better_is_named():
    """Neither its name, nor its function's, nor a copy with shuffled weights."""
    with pytest.warns(UserWarning, match="whether a higher 'metric' is better"):
        assert not Evaluated(lambda model: 0.5, Net()).higher


@pytest.mark.slow
def test_a_loss_in_noise_needs_a_noise_that_is_known(batches):
    """Of one number that never varies, and of a divergence, nobody knows it; of examples it is."""
    for evaluate in (None, lambda model: {"error": 0.5}):
        with pytest.raises(ValueError, match="a value for each example"):
            search(Net().eval(), batches, {"max_loss": "2 noise"}, evaluate=evaluate)
    budget = {"max_loss": "2 noise", "bytes": 8_000}
    assert search(Net().eval(), batches, budget, evaluate=values_of).met


def fails(model: nn.Module) -> float:
    raise KeyError("labels")


def runs_out(answers: list[float]):
    """As a metric that reads an iterator which is at its end the second time."""

    def accuracy(model: nn.Module) -> float:
        return answers.pop(0)

    return accuracy


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (fails, "evaluate fails for the original model: KeyError: 'labels'"),
        (runs_out([0.9, float("nan")]), "each call must read its data from the start"),
        (lambda model: float("inf"), "metric=inf for the original model"),
    ],
    ids=["raises", "reads an iterator", "infinite"],
)
def test_a_metric_that_cannot_judge_the_original_is_refused(evaluate, message, batches):
    with pytest.raises(ValueError, match=message):
        search(Net().eval(), batches, {"bytes": 8_000}, evaluate=evaluate)


def test_a_metric_that_varies_or_takes_long_is_said(batches):
    """The change is noise; a second call of a slow one isn't made."""
    told: list[str] = []
    answers = [0.9, 0.8]
    judge = Evaluated(runs_out(answers), Net(), say=told.append)
    assert judge.noise == pytest.approx(0.1) and "for the same model" in told[0]
    Evaluated(runs_out([0.9]), Net(), seconds=1e-9, say=told.append)
    assert "whether it varies isn't tried" in told[1]


@pytest.mark.slow
def test_a_metric_that_fails_for_compressed_models_is_a_failed_point(batches):
    """Whatever it raises; the result says how many failed, and why the first did."""

    def picky(model: nn.Module) -> float:
        return 0.9 if isinstance(model[0], nn.Linear) else {}["int8"]

    result = search(Net().eval(), batches, {"bytes": 5_000}, evaluate=picky)
    assert not result.met and "points failed" in result.reason
    assert "KeyError: 'int8'" in result.reason


class Embedded(Net):
    """Its answers have length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(x), dim=-1)


@pytest.mark.parametrize("kind", [Embedded, lambda: nn.Sequential(Net(), nn.Sigmoid())])
def test_embeddings_and_probabilities_are_no_logits(kind, batches):
    """Their softmax is nearly uniform whatever they are, so they are compared by their cosine."""
    judge = Divergence(kind(), batches)
    assert judge.name == "cosine_distance" and judge.scale == 1
    assert Divergence(Net(), batches).logits


@pytest.mark.slow
def test_percents_of_a_divergence_are_of_the_entropy(batches):
    """The original's cross-entropy against itself; so a loss of some percent can be kept."""
    model = Net().eval()
    with torch.no_grad():
        odds = torch.cat([model(batch) for batch in batches]).softmax(-1)
    expected = torch.distributions.Categorical(odds).entropy().mean().item()
    assert Divergence(model, batches).scale == pytest.approx(expected, rel=1e-4)
    assert Divergence(nn.Flatten(0), [torch.ones(2, 3)]).scale == 1
    result = search(model, batches, {"max_loss": "1%", "bytes": 8_000})
    assert result.met and result.file.stem != "original"


def test_calibration_that_does_not_fit_is_refused(batches):
    with pytest.raises(ValueError, match="doesn't run on the first batch of calibration"):
        search(
            Net().eval(),
            [torch.randn(4, 5)],
            {"bytes": 8_000},
            evaluate=lambda model: {"error": 0.5},
        )
    with pytest.raises(ValueError, match="outputs on calibration are not finite"):
        search(Net().eval(), [*batches, torch.full((4, 16), math.nan)], {"bytes": 8_000})
    with pytest.raises(ValueError, match="Net doesn't run on example_inputs: RuntimeError"):
        compress(Net().eval(), torch.ones(2, 5), calibration=batches, budget={"bytes": 8_000})


@pytest.mark.slow
def test_a_full_disk_ends_the_search_with_what_is_there(batches, tmp_path, monkeypatch):
    """The points before it count, one line says why there are no more, no file is half there."""
    told: list[str] = []
    save = checkpoint.save
    saved: list[str] = []

    def until_full(model, path, **options):
        if len(saved) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        saved.append(path.name)
        save(model, path, **options)

    monkeypatch.setattr("quantize.compression.search.trial.checkpoint.save", until_full)
    options = {"out": tmp_path, "progress": told.append}
    result = search(Net().eval(), batches, {"speedup": 3.0}, **options)
    assert {row["name"] for row in result.rows} == {name.split(".s")[0] for name in saved}
    assert any("No space left on device" in line for line in told)
    assert result.met == (max(row["speedup"] for row in result.rows) >= 3.0)
    assert result.file.is_file()


@pytest.fixture
def turns(monkeypatch) -> list[tuple[list[str], int]]:
    """The names and rounds of every comparison; files of "low_rank" models can't be timed."""
    seen = []

    def compared(files, *args, rounds, **options):
        seen.append((list(files), rounds))
        measured = measured_by_bytes(files, *args)
        failing = {"latency_ms": None, "speedup": None, "failed": "no memory"}
        return [replace(one, **failing) if "low" in one.name else one for one in measured]

    monkeypatch.setattr("quantize.compression.search.trial.compare", compared)
    return seen


def test_what_people_pick_is_timed_beside_the_original_at_once(batches, tmp_path, turns):
    """In the turns of the first measurement; a process that fails there costs its own row only."""
    result = search(Net().eval(), batches, {"bytes": 15_000}, out=tmp_path)
    first = ["original", "again", "int8", "pruned0.3+int8", "low_rank0.7+int8"]
    assert turns[0] == (first, FIRST_ROUNDS)
    names = [row["name"] for row in result.rows]
    assert names[:4] == [name for name in first if name != "again"]
    assert result.rows[3]["notes"] == "failed: no memory" and result.met


@pytest.mark.slow
def test_a_large_model_is_measured_beside_one_at_a_time(batches, turns, monkeypatch):
    """Memory holds as few of them as can be; what people pick is tried all the same."""
    monkeypatch.setattr("quantize.compression.search.walk.LARGE", 1000)
    result = search(Net().eval(), batches, {"speedup": 1000})
    assert turns[0] == (["original", "again"], FIRST_ROUNDS)
    names = {row["name"] for row in result.rows}
    assert {"int8", "pruned0.3+int8", "low_rank0.7+int8"} <= names


@pytest.mark.slow
def test_a_point_that_has_lost_too_much_gets_one_turn(batches, turns):
    """It can't be chosen, and only predictions use its speed."""
    result = search(Net().eval(), batches, {"max_loss": 0.05}, evaluate=values_of)
    lost = {row["name"] for row in result.rows if row["file"] and not row["within"]}
    hurried = {names[1] for names, rounds in turns if rounds == HOPELESS_ROUNDS}
    assert hurried and hurried < lost


@pytest.mark.slow
def test_budgets_that_contradict_each_other_name_what_the_targets_cost(batches):
    """Nothing that is small enough loses nothing: which point is, and what it loses."""
    result = search(Net().eval(), batches, {"bytes": 8_000, "max_loss": 0.0})
    assert not result.met
    reaching = [row for row in result.rows if row["reaches"]]
    least = min(reaching, key=lambda row: row["loss"])
    assert f"{least['name']} reaches the targets, but the loss is" in result.reason


def test_a_busy_minute_is_not_what_latencies_are_told_by(batches, monkeypatch):
    """In the first measurement all files were three times as slow as in the others."""
    factors = itertools.chain([3.0], itertools.repeat(1.0))

    def compared(*args, **options):
        factor = next(factors)
        slower = []
        for one in measured_by_bytes(*args):
            median = factor * one.latency_ms.median
            slower.append(replace(one, latency_ms=replace(one.latency_ms, median=median)))
        return slower

    monkeypatch.setattr("quantize.compression.search.trial.compare", compared)
    result = search(Net().eval(), batches, {"bytes": 8_000})
    usual = result.rows[0]["latency_ms"]["median"] / 3
    for row in result.rows:
        assert row["latency_in_turns_ms"] == pytest.approx(usual / row["speedup"])


@pytest.mark.slow
def test_a_folder_answers_another_budget_from_its_points(batches, tmp_path, monkeypatch):
    """What one budget measured counts for the next: nothing is made twice."""
    model = Net().eval()
    first = search(model, batches, {"speedup": 2.0}, out=tmp_path)
    made = []
    call = Recipe.__call__
    monkeypatch.setattr(Recipe, "__call__", lambda self, *a: made.append(self) or call(self, *a))
    second = search(model, batches, {"speedup": 2.5}, out=tmp_path)
    names = [row["name"] for row in first.rows]
    assert [row["name"] for row in second.rows][: len(names)] == names
    assert len(made) == len(second.rows) - len(names)
    again = search(model, batches, {"speedup": 2.0}, out=tmp_path)
    chosen = next(row for row in again.rows if row["name"] == again.file.stem)
    assert_preferred(chosen, [row for row in again.rows if row["fits"] and row["speedup"] > 2.1])
    assert again.met


def test_a_folder_of_another_metric_is_refused(batches, tmp_path):
    """Its losses are of something else: by its name, or by what the original has of it."""
    budget = {"bytes": 15_000}
    search(Net().eval(), batches, budget, evaluate=lambda model: {"error": 0.5}, out=tmp_path)
    with pytest.raises(ValueError, match="other metric"):
        search(Net().eval(), batches, budget, out=tmp_path)
    with pytest.raises(ValueError, match=r"error of the original is 0\.5, here it is 0\.6"):
        search(Net().eval(), batches, budget, evaluate=lambda model: {"error": 0.6}, out=tmp_path)
