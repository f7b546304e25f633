"""`compress` with what goes wrong: metrics that fail, vary or take long, calibration that doesn't
fit, a full disk, a busy machine. Latencies are made up, as in `test_search`.
"""

from __future__ import annotations

import errno
import itertools
import math
from dataclasses import replace

import pytest
import torch
from compression.search.test_judges import values_of
from compression.search.test_search import Net, assert_preferred, batches, by_bytes, search
from helpers import measured_by_bytes
from torch import nn

from quantize import checkpoint, compress
from quantize.compression.recipe import Recipe
from quantize.compression.search.judge import Evaluated
from quantize.compression.search.trial import FIRST_ROUNDS, HOPELESS_ROUNDS

__all__ = ["batches", "by_bytes"]  # fixtures for the tests here


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


@pytest.mark.parametrize(
    ("name", "content"),
    [("report.json", "{}"), ("search.json", '{"mine": 1}'), ("search.json", "{"), ("", "")],
)
def test_a_folder_of_something_else_stays_as_it_is(name, content, batches, tmp_path):
    """Before any work, whatever is in it."""
    path = tmp_path / "out" / name if name else tmp_path / "out"
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)

    def evaluate(model: nn.Module) -> float:
        raise AssertionError("the folder is looked at first")

    with pytest.raises(ValueError, match=r"give another out=|is not a folder"):
        search(Net(), batches, {"speedup": 2.0}, evaluate=evaluate, out=tmp_path / "out")
    assert path.read_text() == content and len(list(tmp_path.rglob("*"))) == 1 + bool(name)


def test_a_folder_of_another_metric_is_refused(batches, tmp_path):
    """Its losses are of something else: by its name, or by what the original has of it."""
    budget = {"bytes": 15_000}
    search(Net().eval(), batches, budget, evaluate=lambda model: {"error": 0.5}, out=tmp_path)
    with pytest.raises(ValueError, match="other metric"):
        search(Net().eval(), batches, budget, out=tmp_path)
    with pytest.raises(ValueError, match=r"error of the original is 0\.5, here it is 0\.6"):
        search(Net().eval(), batches, budget, evaluate=lambda model: {"error": 0.6}, out=tmp_path)
