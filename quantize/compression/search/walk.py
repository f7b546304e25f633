"""Tries recipes until the minutes are over, and chooses the best one that was measured.

First what people pick by hand, so that nothing worse is returned, then choices layer by layer,
corrected by what was measured, then what else keeps every channel (16 bits, int4), models with
fewer blocks, pruned and factorized ones where layers can't be chosen one by one, then a training of
what came near. Once a point reaches the targets and has lost nothing but noise, the minutes that
are left look for a faster one that does too.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial

from torch import nn

from quantize.compression.recipe import Drop, Int8, Recipe
from quantize.compression.search import choosing, strategy
from quantize.compression.search.depth import Losses
from quantize.compression.search.layered import ROUNDS, Choice, Layered, seconds_of
from quantize.compression.search.options import as_values, from_values
from quantize.compression.search.points import Row
from quantize.compression.search.times import BF16, FLOAT, INT4, INT8
from quantize.compression.search.trial import Trial, file_name
from quantize.compression.search.units import survey
from quantize.host import native_bf16

MOST_SHARES = 6  # of one technique, where layers can't be chosen one by one
TRAINED = 3  # models that a training is tried on, the ones that lost least
WORTH = 1.1  # times as fast as what needs none: what a training is tried for
FIRST_STEPS, MOST_STEPS = 20, 400  # of a training
LARGE = 1 << 29  # bytes of a model: a process for each of the first points would take too much
REPORT_S = 1.0  # of writing it
OPENING = 0.3  # share of the minutes after which no more is made before the original is measured
SOME_LINEAR = 0.1  # share of the parameters from which on linear layers may get 4 bits


class Walk:
    """Walks over recipes until the time is over."""

    def __init__(self, trial: Trial, seconds: float) -> None:
        self.trial, self.seconds = trial, seconds
        self.end = time.monotonic() + seconds - REPORT_S  # for what is measured once more too
        self.deadline = self.end  # for points
        self.rounds = choosing.MOST_ROUNDS  # of what is measured once more
        self.taken: list[float] = []  # seconds of each point
        self.was_cut = False  # whether something was left out, as no time was left
        self.budget = budget = trial.budget
        self.small_wanted = budget.bytes is not None or budget.memory_mb is not None
        kinds = [type(module) for module in trial.model.modules()]
        self.is_convolutional = kinds.count(nn.Conv2d) > kinds.count(nn.Linear)
        self.tables = self.small_wanted and nn.Embedding in kinds
        self.linear = strategy.share_of_linear(trial.model)
        self.plain: list[Row] = []  # of recipes that keep every channel
        self.has_layout = False  # whether convolutions have their channels last

    @property
    def noise(self) -> float:
        """Of a speed-up, as a share."""
        return choosing.noise_of(self.trial.original())

    def run(self) -> None:
        """Try what the minutes allow; `Trial.rows` has what was measured."""
        self._open()
        original = self.trial.original()
        self.rounds, more = choosing.confirmation(original, choosing.SHARE * self.seconds)
        self.deadline = min(self.deadline, self.end - more)
        self.has_layout = self._is_faster_channels_last()
        first, *others = strategy.whole(self.small_wanted, self.linear > 0.5, self.tables)
        self._try_plain(first)
        self._try(strategy.reduced(strategy.FIRST_SHARE, strategy.PRUNED, self._tail()))
        layered = self._survey(None)
        if layered is not None:
            self._by_layer(layered)
        self._try(strategy.reduced(strategy.FIRST_SHARE, strategy.FACTORIZED, self._tail()))
        if self._spare() is None:
            for recipe in others:
                self._try_plain(recipe)
            self._smooth()
            if layered is not None:
                self._with_more_kinds()
        self._drop()
        if layered is None:
            for kind in (strategy.PRUNED, strategy.FACTORIZED):
                self._reduce(kind)
        self._recover()

    def _open(self) -> None:
        """The original and the recipes that people pick, measured in the same turns: they are made
        while measuring processes import what the model needs.
        """
        if sum(tensor.nbytes for tensor in self.trial.model.parameters()) > LARGE:
            return
        recipes = list(strategy.by_hand(self.tables))
        if self.is_convolutional:
            relaid = [strategy.channels_last(recipe) for recipe in (None, *recipes)]
            recipes = [recipes[0], *relaid]
        started, known = time.monotonic(), len(self.trial.points.rows)
        last = started + OPENING * self.seconds
        try:
            self.trial.open(recipes, lambda: time.monotonic() > last)
        except OSError as error:  # a full disk
            self._stop(error)
        made = len(self.trial.points.rows) - known - 1  # the original isn't
        self.taken += [(time.monotonic() - started) / made] if made > 0 else []

    def _with_more_kinds(self) -> None:
        """Choose by layers among int4 and bfloat16 too, where they may be what is missing."""
        more = [INT4] if self.small_wanted and self.linear > SOME_LINEAR else []
        more += [BF16] if native_bf16("cpu") else []
        layered = self._survey(None, *more) if more else None
        if layered is not None:
            self._by_layer(layered)

    def _try_plain(self, recipe: Recipe) -> None:
        """Try a recipe that keeps every channel."""
        row = self._try(recipe)
        self.plain += [] if row is None else [row]

    def _spare(self) -> float | None:
        """What a model may lose that is nothing but noise, once a point reaches the targets beyond
        noise, has lost no more than that and isn't slower than the original; None before.
        """
        rows = [row for row in self.trial.rows() if row["recipe"] and row["fits"]]
        made = [row for row in rows if row["speedup"] >= 1]
        sure = [row for row in made if self.budget.excess(row, self.noise) <= 0]
        noises = [row["loss_noise"] for row in sure if row["loss"] <= row["loss_noise"]]
        if not noises or not self.budget.has_targets:
            return None
        return min(max(noises), self.trial.allowed)

    def _smooth(self) -> None:
        """Try SmoothQuant where int8 loses something that it could win back."""
        losing = [row for row in self.plain if strategy.uniform(row["recipe"]) == (INT8, 0.0)]
        if any(row["file"] and row["loss"] > row["loss_noise"] for row in losing):
            self._try_plain(strategy.smoothed(self.tables))

    def _is_faster_channels_last(self) -> bool:
        """Whether the order of the convolutions' weights alone makes a convolutional network
        faster.
        """
        if not self.is_convolutional:
            return False
        row = self._try(strategy.channels_last(None))
        return row is not None and row["file"] is not None and row["speedup"] > 1 + self.noise

    def _survey(self, before: Recipe | None, *more: str) -> Layered | None:
        """The parts of the model, after the steps of `before`, with their options, `more` kinds
        among them; None where there are none, or no time.
        """
        trial = self.trial
        key = "whole" if before is None else file_name(before)
        known = trial.points.known.get(key, {"kinds": [], "units": []})
        kinds = [FLOAT, INT8, *more]
        ready = strategy.channels_last(before) if self.has_layout else before
        original = trial.original()
        base = None if ready is None else trial.find(ready)
        call_s = seconds_of(base or original, original)
        is_new = not set(known["kinds"]) >= set(kinds)
        if self._is_over(1 + is_new):  # the parts are worth nothing without a point
            return None
        if is_new:
            try:
                model = trial.model if ready is None else ready(trial.model)
                units = survey(model, trial.given, kinds, trial.say, call_s)
            except Exception as error:  # of somebody's model
                trial.say(f"no choice by layers: {' '.join(str(error).split())[:200]}")
                return None
            known = {"kinds": kinds, "units": as_values(units)}
            self._kept(partial(trial.points.keep_known, key, known))
        units = from_values(known["units"])
        told = (original, trial.budget, trial.allowed, self.tables)
        layered = Layered(units, *told, knows_noise=trial.least_noise == 0, base=base)
        if self.budget.speedup is not None or self.budget.latency_ms is not None:
            layered.margin += self.noise
        return layered

    def _by_layer(self, layered: Layered, before: Recipe | None = None) -> None:
        """Choices of an option for every part that is left by the steps of `before`, each corrected
        by what was measured of such choices; none that is predicted to be no use.
        """
        learned = set()
        gone = strategy.dropped(before.as_values() if before else None)
        rows = self.trial.rows()
        rows.sort(key=lambda row: strategy.has_tables(row["recipe"]) == self.tables)
        for row in rows:  # the last one tells the bytes that no unit has
            parts = layered.parts_of(row)
            if parts is not None and strategy.dropped(row["recipe"]) == gone:
                layered.learn(row, parts)
                learned.add(row["name"])
        tried: dict[Choice, Row] = {}
        for _ in range(ROUNDS):
            choice = layered.next(tried, self._spare())
            recipe = None if choice is None else layered.recipe(choice)
            if choice is None or recipe is None:
                return
            predicted = layered.predicted(choice)
            if 1e3 * layered.original_s / predicted["latency_ms"] < self._fastest():
                return
            recipe = recipe if before is None else before >> recipe
            row = self._try(recipe, predicted)
            if row is None:
                return
            tried[choice] = row
            if row["name"] not in learned:
                layered.learn(row, layered.parts(choice))
                learned.add(row["name"])

    def _drop(self) -> None:
        """Leave out blocks that hardly matter, and choose for what is left by layers."""
        blocks = self._free_blocks()
        if not blocks:
            return
        before = Recipe((Drop(blocks),))
        row = self._try(before)
        if row is None or row["file"] is None:
            return
        self._try(before >> Int8(embeddings=self.tables))
        layered = self._survey(before)
        if layered is not None:
            self._by_layer(layered, before)

    def _free_blocks(self) -> list[str]:
        """The blocks without which the model loses no more than half of what it may, or noise; as
        many as the nearest point is too slow or too large by where no point reaches the targets.
        """
        trial, spare = self.trial, self._spare()
        losses = Losses(trial, self._is_over)
        known = losses.one_by_one(self._kept)
        half = trial.allowed / 2 if trial.allowed < math.inf else 0.0
        most = max(half, trial.judge.noise, trial.least_noise) if spare is None else spare
        return losses.dispensable(known, most, math.ceil(self._missing() * len(known)))

    def _missing(self) -> float:
        """The share of the nearest point within the loss that is too much for the targets."""
        rows = [row for row in self.trial.rows() if row["within"]]
        nearest = max(min(self.budget.excess(row, self.noise) for row in rows), 0.0)
        return nearest / (1 + nearest) if math.isfinite(nearest) else 0.0  # inf: not measured

    def _try(self, recipe: Recipe, predicted: Row | None = None) -> Row | None:
        """The row of a recipe, known or measured now; None when the time or the disk is over."""
        if self.has_layout:
            recipe = strategy.channels_last(recipe)
        known = self.trial.find(recipe)
        if known is not None or self._is_over():
            return known
        started = time.monotonic()
        try:
            row = self.trial.point(recipe, predicted)
        except OSError as error:  # a full disk
            self._stop(error)
            return None
        self.taken.append(time.monotonic() - started)
        shown = row["misses"][0] if row["misses"] else "keeps the budget"
        speed = f"{row['speedup']:.2f}x, loss {row['loss']:.3g}, " if row["file"] else ""
        self.trial.say(f"{row['name']}: {speed}{shown}")
        return row

    def _is_over(self, points: int = 1) -> bool:
        """Whether what takes as long as so many points isn't done before the deadline."""
        usual = max(statistics.median(self.taken), self.taken[-1]) if self.taken else 0.0
        over = time.monotonic() + points * usual > self.deadline
        self.was_cut = self.was_cut or over
        return over

    def _kept(self, write: Callable[[], None]) -> None:
        """Write something that only a later search needs."""
        try:
            write()
        except OSError as error:
            self._stop(error)

    def _stop(self, error: OSError) -> None:
        self.trial.say(f"no more points: {error}")
        self.deadline = -math.inf

    def _tail(self) -> Recipe | None:
        """What rounds the weights of smaller models: the best of those within the loss; nothing,
        where speed is wanted and rounding alone makes the model slower.
        """
        made = [row for row in self.plain if row["within"]]
        if self.small_wanted:
            made.sort(key=lambda row: row["bytes"])
        else:
            made = [row for row in made if not choosing.is_slower(row, self.noise)]
            made.sort(key=lambda row: -row["speedup"])
        return strategy.without_layout(Recipe.from_json(made[0]["recipe"])) if made else None

    def _reduce(self, kind: str) -> None:
        """Shares of one technique, each halfway between too little and too much."""
        tail = self._tail()
        tried: dict[float, bool] = {}
        share: float | None = strategy.FIRST_SHARE
        while share is not None and len(tried) < MOST_SHARES:
            row = self._try(strategy.reduced(share, kind, tail))
            if row is None or row["file"] is None:
                return
            tried[share] = not row["reaches"] if self.budget.has_targets else row["within"]
            share = strategy.between(tried)

    def _recover(self) -> None:
        """Train what has lost something that training may win back, the least first."""
        for row in self._losing()[:TRAINED]:
            recipe = strategy.without_layout(Recipe.from_json(row["recipe"]))
            if recipe is None:
                continue
            first = self._try(strategy.recovered(recipe, FIRST_STEPS))
            if first is None or first["file"] is None:
                return
            left = self.deadline - time.monotonic()
            share = left / max(first["seconds"], 0.1)  # an earlier search may have made it
            steps = min(MOST_STEPS, int(FIRST_STEPS * 0.7 * share))
            if steps > 2 * FIRST_STEPS:
                self._try(strategy.recovered(recipe, steps))

    def _losing(self) -> list[Row]:
        """Smaller models that reach the targets, have lost too much, and would be worth it: faster
        than all that have not. Without a point that reaches the targets, any loss but noise is too
        much.
        """
        fastest, spare = WORTH * self._fastest(), self._enough()
        rows = [row for row in self.trial.rows() if row["reaches"]]
        smaller = [row for row in rows if strategy.is_untrained(row["recipe"])]
        if spare is None:
            losing = [row for row in smaller if row["loss"] > row["loss_noise"]]
        else:
            losing = [r for r in smaller if r["loss"] > spare and r["speedup"] > fastest]
        return sorted(losing, key=lambda row: row["loss"])

    def _enough(self) -> float | None:
        """The loss up to which only speed counts; None before the targets are reached."""
        return self._spare() if self.budget.has_targets else self.trial.allowed

    def _fastest(self) -> float:
        """Speed-up of the fastest point that has lost no more than that; 0 where there is none."""
        enough = self._enough()
        rows = [row for row in self.trial.rows() if row["fits"] and enough is not None]
        return max((row["speedup"] for row in rows if row["loss"] <= enough), default=0.0)
