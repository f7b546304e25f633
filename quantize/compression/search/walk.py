"""`compress`: tries recipes until the minutes are over, and returns the best one that was measured.

First what keeps every channel (16 bits, int8, int4), then pruned and factorized models, then
choices layer by layer, corrected by what was measured, then a training of what came near.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from quantize import checkpoint, surgery
from quantize.calibration import check_batches
from quantize.compression.recipe import ChannelsLast, Given, Recipe
from quantize.compression.search import strategy
from quantize.compression.search.budget import TARGETS, Budget
from quantize.compression.search.judge import Divergence, Evaluated
from quantize.compression.search.layered import ROUNDS, Choice, Layered, as_values, from_values
from quantize.compression.search.times import BF16, FLOAT, INT8
from quantize.compression.search.trial import ORIGINAL, Points, Row, Trial, digest, file_name
from quantize.compression.search.units import survey
from quantize.host import machine, native_bf16
from quantize.measuring.report import write_report

MOST_SHARES, FEW_SHARES = 6, 1  # of one technique; where layers are chosen one by one too
CANDIDATES = 3  # to measure again, the best first
FIRST_STEPS, MOST_STEPS = 20, 400  # of a training


@dataclass(frozen=True)
class Result:
    """What `compress` found.

    Args:
        model: the chosen one, in eval mode; the original where nothing else keeps the loss.
        file: where it is; `quantize.load(file, model=...)` reads it.
        rows: one per point that was tried, as in the report, the original first, with "loss",
            "fits" (whether it keeps the budget), "misses" (what it misses) and "recipe".
        met: whether the chosen one kept the budget when it was measured once more.
        reason: why it was chosen, or what couldn't be reached.
        layers: what each layer of the chosen one got and why: dicts of "name", "got", "why".
    """

    model: nn.Module
    file: Path
    rows: list[Row] = field(repr=False)
    met: bool = False
    reason: str = ""
    layers: list[dict[str, str]] = field(default_factory=list, repr=False)


def compress(
    model: nn.Module,
    example_inputs: Any,
    *,
    calibration: Iterable[Any],
    evaluate: Callable[[Any], Any] | None = None,
    budget: Mapping[str, Any],
    minutes: float = 5.0,
    out: str | Path | None = None,
    seed: int = 0,
    progress: bool | Callable[[str], None] = True,
) -> Result:
    """The best compressed version of `model` that was measured to keep a budget.

    Every point is saved, loaded again, judged, and timed in turns with the original, each in a
    fresh process. Where only a loss is given, the fastest point within it is chosen; where a target
    is given, the point with the least loss that reaches it. The chosen one is measured once more.

    Args:
        model: any nn.Module that `quantize.save` takes; it stays as it is.
        example_inputs: what latency is measured on: a tensor, a tuple of positional arguments or a
            dict of keyword arguments.
        calibration: re-iterable batches like `example_inputs`. Without `evaluate` the second half
            judges, and only the first one calibrates.
        evaluate: evaluate(model) gives a number, a (name, number) pair or a dict whose first entry
            counts. Without it the loss is the KL divergence of logits to the original's, or
            1 - cosine of other outputs.
        budget: any of "speedup", "latency_ms", "bytes", "memory_mb" (to be reached) and "max_loss"
            (largest change of the metric for the worse: a number, "1%" of the original's value, or
            "2 noise").
        minutes: after which no new point is begun.
        out: folder for the files, the rows and the report. A search that was interrupted goes on
            from what is there. None: a temporary folder.
        seed: of the trainings.
        progress: True: lines on standard error; or a function that is called with each.

    Returns:
        A `Result`.

    Raises:
        ValueError: a budget, minutes, calibration or metric that can't be used, or a folder that
            holds the search of another model.
        TypeError: arguments of the wrong type, a model that no file can hold.
        MeasurementError: the original fails on `example_inputs`.
    """
    wanted = Budget.of(budget)
    if not (isinstance(minutes, (int, float)) and 0 < minutes < 10_000):
        raise ValueError(f"minutes is {minutes!r}; allowed: a number > 0")
    batches = list(check_batches(calibration))
    lines = _line if progress else _nothing
    say = progress if callable(progress) else lines
    deadline = time.monotonic() + 60 * minutes
    work = surgery.clone(model).eval()
    half = len(batches) if evaluate is not None or len(batches) == 1 else (len(batches) + 1) // 2
    if evaluate is None:
        judge: Any = Divergence(work, batches[half:] or batches)
    else:
        judge = Evaluated(evaluate, work)
    folder = Path(tempfile.mkdtemp(prefix="quantize-") if out is None else out)
    folder.mkdir(parents=True, exist_ok=True)
    identity = {"class": type(model).__name__, "state": digest(dict(work.state_dict()))}
    identity |= {"calibration": digest(batches), "inputs": digest(example_inputs), "seed": seed}
    given = Given(
        example_inputs=example_inputs,
        calibration=batches[:half],
        batches=batches[:half],
        seed=seed,
    )
    points = Points(folder, identity)
    search = _Search(Trial(work, example_inputs, given, judge, wanted, points, say), deadline)
    rows = search.run()
    result = search.choose(rows)
    _report(result, folder, minutes, seed)
    say(result.reason)
    return result


class _Search:
    """Walks over recipes until the time is over."""

    def __init__(self, trial: Trial, deadline: float) -> None:
        self.trial, self.deadline = trial, deadline
        budget = trial.budget
        self.has_targets = any(getattr(budget, name) is not None for name in TARGETS)
        self.small_wanted = budget.bytes is not None or budget.memory_mb is not None
        self.rows: list[Row] = []
        self.has_layout = False  # whether convolutions have their channels last

    def run(self) -> list[Row]:
        self.rows.append(self.trial.original())
        self.has_layout = self._is_faster_channels_last()
        for recipe in strategy.whole(self.small_wanted):
            self._try(recipe)
        self._smooth()
        if self._is_done():
            return self.rows
        layered = self._survey()
        if layered is None:
            self._try(strategy.where_faster())
        tail = self._tail()
        most = MOST_SHARES if layered is None else min(FEW_SHARES, MOST_SHARES)
        for kind in (strategy.PRUNED, strategy.FACTORIZED):
            self._reduce(kind, tail, most)
        if layered is not None and not self._is_done():
            self._by_layer(layered)
        if not self._is_done():
            self._recover()
        return self.rows

    def _is_done(self) -> bool:
        """Whether a point reaches the targets and has lost nothing that noise isn't."""
        made = [row for row in self.rows if row["recipe"] and row["fits"]]
        return self.has_targets and any(row["loss"] <= row["loss_noise"] for row in made)

    def _smooth(self) -> None:
        """Try SmoothQuant where int8 loses something that it could win back."""
        losing = [row for row in self.rows if strategy.uniform_kind(row["recipe"]) == INT8]
        if any(row["file"] and row["loss"] > row["loss_noise"] for row in losing):
            self._try(strategy.smoothed(self.small_wanted))

    def _is_faster_channels_last(self) -> bool:
        """Whether the order of the convolutions' weights alone makes a convolutional network
        faster.
        """
        kinds = [type(module) for module in self.trial.model.modules()]
        if not kinds.count(nn.Conv2d) > kinds.count(nn.Linear):
            return False
        row = self._try(strategy.channels_last(None))
        noise = self.rows[0]["speed_noise"]
        return row is not None and row["file"] is not None and row["speedup"] > 1 + noise

    def _survey(self) -> Layered | None:
        """The parts of the model with their options; None where there are none, or no time."""
        if time.monotonic() > self.deadline:
            return None
        trial = self.trial
        values = trial.points.units
        if values is None:
            kinds = [FLOAT, INT8, *([BF16] if native_bf16("cpu") else [])]
            layout = Recipe((ChannelsLast(),)) if self.has_layout else None
            model = trial.model if layout is None else layout(trial.model)
            try:
                values = as_values(survey(model, trial.given, kinds, trial.say))
            except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
                trial.say(f"no choice by layers: {' '.join(str(error).split())[:200]}")
                return None
            trial.points.keep_units(values)
        units = from_values(values)
        return Layered(units, self.rows[0], trial.budget, trial.allowed, self.small_wanted)

    def _by_layer(self, layered: Layered) -> None:
        """Choices of an option for every part, each corrected by what was measured before."""
        for row in self.rows:
            kind = strategy.uniform_kind(row["recipe"])
            if kind is not None:
                layered.learn(row, layered.uniform(kind))
        tried: dict[Choice, Row] = {}
        for _ in range(ROUNDS):
            choice = layered.next(tried)
            recipe = None if choice is None else layered.recipe(choice)
            if choice is None or recipe is None:
                return
            row = self._try(recipe, layered.predicted(choice))
            if row is None:
                return
            tried[choice] = row
            layered.learn(row, layered.options(choice))

    def _try(self, recipe: Recipe, predicted: Row | None = None) -> Row | None:
        if time.monotonic() > self.deadline:
            return None
        if self.has_layout:
            recipe = strategy.channels_last(recipe)
        name = file_name(recipe)
        known = next((row for row in self.rows if row["name"] == name), None)
        if known is not None:
            return known
        row = self.trial.point(recipe, predicted)
        self.rows.append(row)
        shown = row["misses"][0] if row["misses"] else "keeps the budget"
        speed = f"{row['speedup']:.2f}x, loss {row['loss']:.3g}, " if row["file"] else ""
        self.trial.say(f"{row['name']}: {speed}{shown}")
        return row

    def _tail(self) -> Recipe | None:
        """What rounds the weights of smaller models: the best of those within the loss."""
        made = [row for row in self.rows if row["recipe"] and row["within"]]
        if self.small_wanted:
            made.sort(key=lambda row: row["bytes"])
        else:
            made.sort(key=lambda row: -row["speedup"])
        return strategy.without_layout(Recipe.from_json(made[0]["recipe"])) if made else None

    def _reduce(self, kind: str, tail: Recipe | None, most: int) -> None:
        """Shares of one technique, each halfway between too little and too much."""
        tried: dict[float, bool] = {}
        share: float | None = strategy.SHARES[0]
        while share is not None and len(tried) < most:
            row = self._try(strategy.reduced(share, kind, tail))
            if row is None or row["file"] is None:
                return
            tried[share] = not row["reaches"] if self.has_targets else row["within"]
            share = strategy.between(tried)

    def _recover(self) -> None:
        """Train what reaches the targets and has lost most; or what is fast and lost too much."""
        smaller = [row for row in self.rows if row["recipe"] and self._is_smaller(row)]
        useful = [row for row in smaller if row["reaches"] and row["loss"] > row["loss_noise"]]
        useful.sort(key=lambda row: row["loss"])
        for row in useful[:CANDIDATES]:
            recipe = strategy.without_layout(Recipe.from_json(row["recipe"]))
            if recipe is None:
                continue
            started = time.monotonic()
            first = self._try(strategy.recovered(recipe, FIRST_STEPS))
            if first is None or first["file"] is None:
                return
            took = time.monotonic() - started
            left = self.deadline - time.monotonic()
            steps = min(MOST_STEPS, int(FIRST_STEPS * 0.7 * left / max(took, 0.1)))
            if steps > 2 * FIRST_STEPS:
                self._try(strategy.recovered(recipe, steps))

    def _is_smaller(self, row: Row) -> bool:
        names = {step["step"] for step in row["recipe"]}
        return bool(names & {"Prune", "LowRank"}) and "Recover" not in names

    def choose(self, rows: list[Any]) -> Result:
        """The best row that keeps the budget when it is measured once more; else the best there
        is, and why it isn't enough.
        """
        for row in strategy.best(rows, fastest=not self.has_targets)[:CANDIDATES]:
            again: Any = row if row["name"] == ORIGINAL else self.trial.confirmed(dict(row))
            if again["fits"]:
                return self._result(again, True, f"{row['name']} keeps the budget: {_facts(again)}")
            rows[rows.index(row)] = again
        within = [row for row in rows if row["within"]]
        nearest = max(within, key=lambda row: (len(row["misses"]) == 0, row["speedup"] or 0.0))
        if self.small_wanted:
            nearest = min(within, key=lambda row: row["bytes"])
        why = "; ".join(nearest["misses"])
        return self._result(
            nearest, False, f"the budget can't be met here: {why}. {_facts(nearest)}"
        )

    def _result(self, row: Row, met: bool, reason: str) -> Result:
        file = self.trial.path(row["name"])
        rows = [row if other["name"] == row["name"] else other for other in self.rows]
        model = checkpoint.load(file, self.trial.model)
        return Result(model, file, rows, met, reason, _layers(row, model))


def _layers(row: Row, model: nn.Module) -> list[dict[str, str]]:
    """What each layer got and why: of a choice by layers its reasons, else what the steps say."""
    if row.get("predicted"):
        return row["predicted"]["layers"]
    summary = checkpoint.summary(model)
    left = {name: why for name, why in summary.left.items() if name not in summary.done}
    told = [{"name": n, "got": got, "why": "by its recipe"} for n, got in summary.done.items()]
    return told + [{"name": n, "got": "stays as it is", "why": why} for n, why in left.items()]


def _facts(row: Row) -> str:
    latency = row["latency_ms"]
    timed = f"{latency['median']:.4g} ms ({row['speedup']:.2f}x), " if latency else ""
    return f"{row['name']}: {timed}{row['bytes']} bytes, loss {row['loss']:.3g}"


def _report(result: Result, folder: Path, minutes: float, seed: int) -> None:
    data = {"minutes": minutes, "seed": seed, "chosen": result.file.name, "reason": result.reason}
    data["layers"] = result.layers
    shown = [row for row in result.rows if row["metric"]]
    write_report({"machine": machine(), "data": data, "rows": shown}, folder)


def _line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _nothing(_line: str) -> None:
    pass
