"""The choice layer by layer: solve, build, measure, correct, solve again.

Each round takes the option of every unit that loses least within the budget (or is fastest within
the loss), makes that model by a recipe whose steps name their layers, and measures its file. What
was measured corrects the predictions of the next round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quantize.compression.recipe import Half, Int4, Int8, LowRank, Prune, Recipe, Step
from quantize.compression.search.budget import Budget
from quantize.compression.search.fits import Factors, Parts, Seen, fitted
from quantize.compression.search.knapsack import Frontier, solve
from quantize.compression.search.times import BF16, FLOAT, INT4, INT8
from quantize.compression.search.units import Option, Unit

ROUNDS = 8
_MARGIN, _MORE = 0.02, 0.04  # of a target: asked for beyond it, and more after each miss
_LEAST = 0.02  # share of a latency that is left of any model
_MIXES = (0.5, 0.25, 0.75, 0.1, 0.9, 0.0, 1.0)  # share of latency where bytes count too

Row = dict[str, Any]
Choice = tuple[int, ...]  # of an option for each unit


class Layered:
    """What was chosen and measured so far.

    Args:
        units: the parts of the model.
        original: its row.
        budget: what is asked for.
        allowed: largest loss.
        embeddings: whether tables become int8 too.
        knows_noise: whether the noise of a loss is measured, and not a convention.
        base: row of the model whose layers the units are; None: of the original.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        original: Row,
        budget: Budget,
        allowed: float,
        embeddings: bool,
        knows_noise: bool,
        base: Row | None = None,
    ) -> None:
        self.units, self.budget, self.allowed = list(units), budget, allowed
        self.embeddings, self.knows_noise = embeddings, knows_noise
        self.original_s = original["latency_ms"]["median"] / 1e3
        self.base_s = self.original_s / (base or {"speedup": 1.0})["speedup"]
        self.original_bytes = original["bytes"]
        self.other_mb = _other_mb(original)  # of a process, beside what its file holds
        whole = base or original
        self.rest = whole["bytes"] - sum(unit.options[0].bytes for unit in self.units)
        self.points: list[Seen] = []
        self.margin = _MARGIN

    # What was measured.

    def learn(self, row: Row, parts: Parts) -> None:
        """Take a measured row of a choice with these parts into the predictions."""
        if row["file"] is None or not row["latency_ms"]:
            return
        saved = self.base_s - self.original_s / row["speedup"]
        noise = row["loss_noise"] if self.knows_noise else 0.0
        self.points.append(Seen(parts, saved, row["loss"], noise, row["bytes"]))
        self.other_mb = _other_mb(row)

    def uniform(self, kind: str) -> Parts:
        """Of every unit whole and of this kind; as it is where it has no such option."""
        found = []
        for unit in self.units:
            whole = [o for o in unit.options if o.kind == kind and o.amount == 0 and o.ratio == 1]
            found.append((whole or unit.options)[0])
        return Parts.of(found)

    @property
    def factors(self) -> Factors:
        layers_s = sum(unit.seconds for unit in self.units)
        return fitted(self.points, self.base_s, layers_s, self.rest)

    # What is chosen.

    def choose(self) -> Choice | None:
        """The option of every unit by the present predictions; the cheapest ones where nothing
        reaches the target, None where nothing reaches both.
        """
        factors = self.factors
        latency, size = self._latency_target(), self._bytes_target()
        if latency is None and size is None:
            frontier = self._solve(factors, 1.0)
            return tuple(frontier.cheapest(self.allowed / (1 + self.margin)))
        if latency is None or size is None:
            target = latency if size is None else size
            return self._within(factors, 1.0 if size is None else 0.0, target or 0.0)
        return self._within_both(factors, latency, size)

    def _within(self, factors: Factors, mix: float, target: float) -> Choice:
        frontier = self._solve(factors, mix)
        start = self.base_s / self.original_s if mix else factors.rest / self.original_bytes
        found = frontier.within(target * (1 - self.margin) - start)
        return tuple(found or frontier.within(frontier.least) or ())

    def _within_both(self, factors: Factors, latency: float, size: float) -> Choice | None:
        """Of several weights between latency and bytes, the choice that keeps both for least."""
        fitting: list[tuple[float, Choice]] = []
        for mix in _MIXES:
            frontier = self._solve(factors, mix)
            for loss in sorted(set(frontier.losses[frontier.losses < float("inf")].tolist())):
                choice = tuple(frontier.cheapest(loss))
                parts = Parts.of(self.options(choice))
                fast = self._latency(factors, parts) <= latency * (1 - self.margin)
                small = self._bytes(factors, parts) <= size * (1 - self.margin)
                if fast and small:
                    fitting.append((factors.loss_of(parts), choice))
                    break
        return min(fitting)[1] if fitting else None

    def _solve(self, factors: Factors, mix: float) -> Frontier:
        """Costs are shares of the original's latency (mix 1) or bytes (mix 0)."""
        costs, losses = [], []
        for unit in self.units:
            shares = []
            for option in unit.options:
                time = -factors.saved_s(option) / self.original_s
                shares.append(mix * time + (1 - mix) * option.bytes / self.original_bytes)
            costs.append(shares)
            losses.append([factors.loss(option) for option in unit.options])
        return solve(costs, losses)

    def _latency(self, factors: Factors, parts: Parts) -> float:
        """As a share of the original's; savings of neighbours overlap, and something is left."""
        left = max(self.base_s - factors.saved_by(parts), _LEAST * self.base_s)
        return left / self.original_s

    def _bytes(self, factors: Factors, parts: Parts) -> float:
        return (factors.rest + parts.bytes) / self.original_bytes

    def _latency_target(self) -> float | None:
        """As a share of the original's latency."""
        shares = []
        if self.budget.speedup is not None:
            shares.append(1 / self.budget.speedup)
        if self.budget.latency_ms is not None:
            shares.append(self.budget.latency_ms / 1e3 / self.original_s)
        return min(shares, default=None)

    def _bytes_target(self) -> float | None:
        """As a share of the original's bytes; memory is taken to fall by as many bytes as the file
        does, from what was measured last.
        """
        sizes = []
        if self.budget.bytes is not None:
            sizes.append(self.budget.bytes)
        if self.budget.memory_mb is not None and self.other_mb is not None:
            sizes.append((self.budget.memory_mb - self.other_mb) * 2**20)
        return max(min(sizes), 0.0) / self.original_bytes if sizes else None

    # What is made of it.

    def options(self, choice: Choice) -> list[Option]:
        return [unit.options[index] for unit, index in zip(self.units, choice, strict=True)]

    def recipe(self, choice: Choice) -> Recipe | None:
        """The steps that make the model; None where every unit stays as it is."""
        amounts, ratios = {}, {}
        by_kind: dict[str, list[str]] = {FLOAT: [], INT8: [], BF16: [], INT4: []}
        for unit, option in zip(self.units, self.options(choice), strict=True):
            by_kind[option.kind] += unit.layers
            if option.amount:
                amounts[unit.name] = option.amount
            if option.ratio < 1:
                ratios.update(dict.fromkeys(unit.layers, option.ratio))
        steps: list[Step] = []
        if amounts:
            steps.append(Prune(amounts))
        if ratios:
            steps.append(LowRank(ratios, only_faster=False))
        stays = (*by_kind[FLOAT], *by_kind[BF16])
        if by_kind[INT4]:
            steps.append(Int4(skip=(*stays, *by_kind[INT8])))
        if by_kind[INT8] or (by_kind[INT4] and self.embeddings):
            steps.append(Int8(embeddings=self.embeddings, skip=stays))
        if by_kind[BF16]:
            steps.append(Half("bfloat16", skip=tuple(by_kind[FLOAT])))
        return Recipe(tuple(steps)) if steps else None

    def predicted(self, choice: Choice) -> Row:
        """Latency, loss and bytes, and what each unit got and why."""
        factors, parts = self.factors, Parts.of(self.options(choice))
        return {
            "latency_ms": 1e3 * self.original_s * self._latency(factors, parts),
            "loss": factors.loss_of(parts),
            "bytes": factors.rest + parts.bytes,
            "parts": dataclasses.asdict(parts),
            "layers": list(self._reasons(factors, choice)),
        }

    def _reasons(self, factors: Factors, choice: Choice) -> Iterator[dict[str, str]]:
        for unit, option in zip(self.units, self.options(choice), strict=True):
            names = ", ".join(unit.layers)
            yield {"name": names, "got": _words(option), "why": _why(factors, unit, option)}

    # Rounds.

    def next(self, tried: Mapping[Choice, Row]) -> Choice | None:
        """A choice that wasn't made yet; None where there is none to learn from."""
        for _ in range(ROUNDS):
            choice = self.choose()
            if choice is None or choice not in tried:
                return choice
            row = tried[choice]
            if row["fits"]:
                return None
            self.margin += _MORE
        return None


def _other_mb(row: Row) -> float | None:
    peak = row["peak_rss_mb"]
    return None if peak is None else peak - row["bytes"] / 2**20


def _words(option: Option) -> str:
    words = [] if option.kind == FLOAT else [option.kind]
    if option.amount:
        words.append(f"{option.amount:.3g} of its channels removed")
    if option.ratio < 1:
        words.append(f"pairs of {option.ratio:.3g} of the parameters")
    return ", ".join(words) or "stays as it is"


def _why(factors: Factors, unit: Unit, option: Option) -> str:
    """What the option gives and costs, and what the unit could have had."""
    saved = 1e3 * factors.saved_s(option)
    told = f"saves {saved:.3g} of {1e3 * factors.kind(option) * unit.seconds:.3g} ms"
    told += f" for a loss of {factors.loss(option):.2g}"
    others = [other for other in unit.options if factors.saved_s(other) > factors.saved_s(option)]
    if not others:
        return f"{told}; nothing here is faster"
    nearest = min(others, key=factors.loss)
    more = 1e3 * factors.saved_s(nearest) - saved
    extra = factors.loss(nearest) - factors.loss(option)
    return f"{told}; {_words(nearest)} would save {more:.2g} ms more for {extra:.2g}"


def as_values(units: Sequence[Unit]) -> list[dict[str, Any]]:
    """As JSON, for a search that goes on."""
    return [dataclasses.asdict(unit) for unit in units]


def from_values(values: Sequence[Mapping[str, Any]]) -> list[Unit]:
    """What `as_values` gave."""
    found = []
    for value in values:
        options = tuple(Option(**option) for option in value["options"])
        found.append(Unit(value["name"], tuple(value["layers"]), options, value["seconds"]))
    return found
