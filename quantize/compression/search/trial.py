"""Points of a search: each is made, saved, judged, measured from its file, and written down."""

from __future__ import annotations

import errno
import gc
import hashlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn

from quantize import checkpoint
from quantize.allocator import give_back
from quantize.compression.recipe import Given, Recipe
from quantize.compression.search.budget import Budget
from quantize.compression.search.judge import Score
from quantize.compression.search.points import ORIGINAL, SUFFIX, Points, Row
from quantize.measuring.artifact import MeasurementError
from quantize.measuring.comparison import compare
from quantize.measuring.nursery import Nursery
from quantize.measuring.result import Measurement
from quantize.measuring.rows import build_rows, failed_row, grade
from quantize.saying import Say

BURST_S = 0.1  # length of a turn
ROUNDS, HOPELESS_ROUNDS = 3, 1  # of a point; of one that has lost too much to be chosen
FIRST_ROUNDS = 5  # of the original against itself: they tell the noise
BUSY = 0.1  # share by which the original differs from itself where the machine is busy
UNKNOWN_NOISE = 1e-3  # share of the metric that is noise where nobody knows it, as in reports
HEAVY = 1 << 26  # bytes of a model: garbage of that size is worth the time of a collection
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a second measurement of a file leaves as it is.
_KEPT = ("loss", "loss_noise", "metric", "metric_change", "recipe", "predicted", "seconds")


class Trial:
    """Makes and measures points of one model.

    Args:
        model: the original, in eval mode.
        example_inputs: what latency is measured on.
        given: what recipes work with.
        judge: `judge.Evaluated` or `judge.Divergence`.
        budget: what is asked for.
        points: where rows are kept.
        say: called with a line for people.
        nursery: what measuring processes are forked from.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        given: Given,
        judge: Any,
        budget: Budget,
        points: Points,
        say: Say,
        nursery: Nursery,
    ) -> None:
        self.nursery = nursery
        self.model, self.example_inputs, self.given = model, example_inputs, given
        self.judge, self.budget, self.points, self.say = judge, budget, points, say
        self.allowed = budget.allowed_loss(judge.scale, judge.noise)
        self.least_noise = 0.0 if judge.noise else UNKNOWN_NOISE * judge.scale

    def rows(self) -> list[Row]:
        """All that is known of this model, in the order of measuring, judged by this budget."""
        return [row | self._verdict(row) for row in self.points.rows]

    def find(self, recipe: Recipe) -> Row | None:
        """The row of a recipe that was measured, judged by this budget."""
        known = self.points.find(file_name(recipe))
        return None if known is None else known | self._verdict(known)

    def original(self) -> Row:
        """The row of the model as it is, measured against itself: its speed-up is noise."""
        self.open(())
        row = self.points.rows[0]
        return row | self._verdict(row)

    def open(self, recipes: Sequence[Recipe], is_over: Callable[[], bool] = lambda: False) -> None:
        """Measure the original against itself, and the first points in the same turns.

        Args:
            recipes: of these points.
            is_over: asked before each of them is made.

        Raises OSError where the disk is full, after what is there was measured.
        """
        if self.points.find(ORIGINAL) is not None:
            return
        checkpoint.save(self.model, self.path(ORIGINAL))
        made: dict[Recipe, tuple[Score | str, float]] = {}
        full = None
        for recipe in recipes:
            if is_over() or full is not None:
                break
            started = time.monotonic()
            try:
                made[recipe] = self._scored(recipe), time.monotonic() - started
            except OSError as error:
                full = error
        self.say("measuring the original against itself")
        files = [
            file_name(recipe) for recipe, (score, _) in made.items() if isinstance(score, Score)
        ]
        measured = self._compare([ORIGINAL, *files], FIRST_ROUNDS)
        base, again, *_ = measured
        row = build_rows([base, again])[0]
        noise = abs(1 - (again.speedup or 1.0))
        row |= {"speed_noise": max(noise, 0.01), "loss": 0.0, "loss_noise": self.judge.noise}
        row |= {"metric": self._metric(self.judge.metrics), "metric_change": 0.0}
        if noise > BUSY:
            self.say(f"a busy machine: the original against itself differs by {noise:.0%}")
        self._keep(row, None)
        for recipe, (score, seconds) in made.items():
            row = self._row(recipe, score, measured) | {"seconds": seconds}
            self._keep(row, recipe)
        if full is not None:
            raise full

    def point(self, recipe: Recipe, predicted: Row | None = None) -> Row:
        """The row of one recipe, with what was predicted of it and the seconds that it took; one
        that fails has no file and says why. Raises OSError where the disk is full.
        """
        started = time.monotonic()
        score = self._scored(recipe)
        measured: list[Measurement] = []
        try:
            if isinstance(score, Score):
                hopeless = score.loss > self.allowed + max(score.noise, self.least_noise)
                rounds = HOPELESS_ROUNDS if hopeless else ROUNDS
                measured = self._compare([file_name(recipe)], rounds)
        except MeasurementError as error:
            score = _reason(error)
        row = self._row(recipe, score, measured)
        row["seconds"] = time.monotonic() - started
        return self._keep(row, recipe, predicted)

    def path(self, name: str) -> Path:
        return self.points.folder / f"{name}{SUFFIX}"

    def confirmed(self, rows: Sequence[Row], rounds: int) -> list[Row]:
        """Rows measured once more, side by side with the original; a choice rests on them. One that
        fails now isn't among them.
        """
        names = [row["name"] for row in rows]
        self.say(f"measuring {', '.join(names)} once more")
        measured = build_rows(self._compare(names, rounds))[1:]
        fresh = []
        for row, again in zip(rows, measured, strict=True):
            if again["file"] is None:
                self.say(f"{row['name']} {again['notes']}")
                continue
            new = again | {key: row[key] for key in _KEPT}
            self._mark(new)
            fresh.append(new | self._verdict(new))
        return fresh

    def _scored(self, recipe: Recipe) -> Score | str:
        """What the file of a recipe has lost; why there is none, or it can't be judged. Raises
        OSError where the disk is full.
        """
        path = self.path(file_name(recipe))
        metadata = {"recipe": recipe.as_values(), "search": self.points.key}
        self.say(f"trying {path.stem}")
        try:
            small = self._finished(path, metadata)
            if small is None:
                self._make(recipe, path, metadata)
                small = checkpoint.load(path, self.model)
            return self.judge.score(small)
        except Exception as error:  # of somebody's model or metric
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            return _reason(error)

    def _finished(self, path: Path, metadata: Row) -> nn.Module | None:
        """The model of a file that this search had written before it was interrupted; None where
        there is none.
        """
        try:
            same = path.is_file() and checkpoint.read_metadata(path) == metadata
            return checkpoint.load(path, self.model) if same else None
        except checkpoint.CheckpointError:  # damaged: it is made again
            return None

    def _make(self, recipe: Recipe, path: Path, metadata: Row) -> None:
        """Write the file of a recipe."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the summary has what was left
            small = recipe(self.model, self.given)
        checkpoint.save(small, path, metadata=metadata)

    def _row(self, recipe: Recipe, score: Score | str, measured: Sequence[Measurement]) -> Row:
        """Of a point with this score, measured beside the original, which comes first."""
        name = file_name(recipe)
        if isinstance(score, str):
            return failed_row(name, score, self.points.rows[0])
        one = next(one for one in measured if one.name == name)
        if one.failed is not None:
            return failed_row(name, one.failed, self.points.rows[0])
        row = build_rows([measured[0], one])[1]
        row["metric"] = self._metric(score.metrics)
        row["metric_change"] = row["metric"]["value"] - self.judge.value
        row |= {"loss": score.loss, "loss_noise": max(score.noise, self.least_noise)}
        self._mark(row)
        return row

    def _mark(self, row: Row) -> None:
        """Put how much worse a row is than the original before its other notes."""
        marks = [row["notes"]] if row["notes"] else []
        if self.judge.value:
            marks[:0] = grade(self.judge.value, row["loss"], row["loss_noise"])
        row["notes"] = "; ".join(marks)

    def _metric(self, metrics: Mapping[str, float]) -> Row:
        (name, value), *others = metrics.items()
        better = {"higher_is_better": self.judge.higher, "also": dict(others)}
        return {"name": name, "value": value, **better}

    def _compare(self, names: Sequence[str], rounds: int) -> list[Measurement]:
        """The original, then the files of these names; one that fails says why."""
        files = {ORIGINAL: self.path(ORIGINAL)}
        for name in names:
            files["again" if name == ORIGINAL else name] = self.path(name)
        if self.path(ORIGINAL).stat().st_size > HEAVY:
            gc.collect()
        give_back()  # what making the files has left: each process needs room for its model
        measured = compare(
            files,
            self.example_inputs,
            model=self.model,
            rounds=rounds,
            burst_seconds=BURST_S,
            nursery=self.nursery,
            keep_going=True,
        )
        if measured[0].latency_ms is not None:
            self.points.known.setdefault("original_ms", []).append(measured[0].latency_ms.median)
        return measured

    def _keep(self, row: Row, recipe: Recipe | None, predicted: Row | None = None) -> Row:
        row["recipe"] = None if recipe is None else recipe.as_values()
        row["predicted"] = predicted
        row |= self._verdict(row)
        self.points.keep(row)
        return row

    def _verdict(self, row: Row) -> Row:
        """Whether the row is within the loss, reaches the targets, and what it misses.

        A busy moment makes a file slower and the original that took turns with it: a latency is the
        median of all that the original had, over the ratio of both.
        """
        if row["file"] is None:
            return {"within": False, "reaches": False, "fits": False, "misses": [row["notes"]]}
        latency = median(self.points.known["original_ms"]) / row["speedup"]
        misses = self.budget.misses(row | {"latency_in_turns_ms": latency})
        within = row["loss"] <= self.allowed
        reaches = not misses
        if not within:
            misses.append(f"the loss is {row['loss']:.4g}, at most {self.allowed:.4g} is allowed")
        verdict = {"within": within, "reaches": reaches, "fits": not misses, "misses": misses}
        return verdict | {"latency_in_turns_ms": latency}


def _reason(error: Exception) -> str:
    """In one line; errors of this package say by themselves whose they are."""
    said = " ".join(str(error).split())[:300]
    ours = (ValueError, TypeError, RuntimeError, NotImplementedError)
    return said if isinstance(error, ours) and said else f"{type(error).__name__}: {said}"


def file_name(recipe: Recipe) -> str:
    """A recipe's name with the numbers that tell it from others of that name."""
    parts = []
    for step in recipe.steps:
        numbers = {"Prune": "amount", "LowRank": "ratio", "Recover": "steps"}
        number = numbers.get(type(step).__name__)
        options = [name for name in ("embeddings", "smooth") if getattr(step, name, False)]
        value = _shown(getattr(step, number)) if number else ""
        parts.append("_".join([step.part + value, *options]))
    return "+".join([*parts, *_by_layer(recipe)])


def _shown(value: Any) -> str:
    return "_by_layer" if isinstance(value, Mapping) else f"{value:g}"


def _by_layer(recipe: Recipe) -> list[str]:
    """What tells a recipe that names layers from others: the start of a digest."""
    values: list[Any] = []
    for step in recipe.as_values():
        values += step.values()
    if not any(value for value in values if isinstance(value, (dict, list))):
        return []
    return [hashlib.sha256(recipe.to_json().encode()).hexdigest()[:8]]
