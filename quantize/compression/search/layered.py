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
from quantize.compression.search import strategy
from quantize.compression.search.budget import Budget
from quantize.compression.search.fits import Factors, Parts, Seen, fitted
from quantize.compression.search.knapsack import Frontier, solve
from quantize.compression.search.options import Option, Unit
from quantize.compression.search.times import BF16, FLOAT, INT4, INT8

ROUNDS = 8
_MARGIN, _MORE = 0.02, 0.04  # of a target: asked for beyond it, and more after each miss
_LEAST = 0.02  # share of a latency that is left of any model
_CLOSER = 0.7  # of what a point was predicted to lose that lost too much
_MIXES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)  # share of latency where bytes count too

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
        self.original, self.original_s = original, seconds_of(original, original)
        self.base_s = seconds_of(base or original, original)
        self.latency_ms = original["latency_in_turns_ms"]
        self.original_bytes = original["bytes"]
        self.other_mb = _other_mb(original)  # of a process, beside what its file holds
        whole = base or original
        floats = [unit.options[0] for unit in self.units]
        self.rest = whole["bytes"] - Parts.of(floats).bytes
        self.points: list[Seen] = []
        self.margin = _MARGIN

    # What was measured.

    def learn(self, row: Row, parts: Parts) -> None:
        """Take a measured row of a choice with these parts into the predictions."""
        if row["file"] is None or not row["latency_ms"]:
            return
        saved = self.base_s - seconds_of(row, self.original)
        noise = row["loss_noise"] if self.knows_noise else 0.0
        self.points.append(Seen(parts, saved, row["loss"], noise, row["bytes"]))
        self.other_mb = _other_mb(row)

    def parts_of(self, row: Row) -> Parts | None:
        """The sums that a measured row was predicted from; None for recipes that have none."""
        if row["predicted"]:
            return Parts(**row["predicted"]["parts"])
        found = strategy.uniform(row["recipe"])
        return None if found is None else self.uniform(*found)

    def uniform(self, kind: str, amount: float) -> Parts:
        """Of every unit of this kind, less that share of its channels; whole where it has no such
        option, as it is where it can't be of the kind.
        """
        found = []
        for unit in self.units:
            alike = [o for o in unit.options if o.kind == kind and o.ratio == 1]
            wider = [option for option in alike if option.amount <= amount]
            found.append(max(wider or unit.options[:1], key=lambda option: option.amount))
        return self._parts(found)

    @property
    def factors(self) -> Factors:
        layers_s = sum(unit.seconds for unit in self.units)
        return fitted(self.points, self.base_s, layers_s, self.rest)

    # What is chosen.

    def choose(self, spare: float | None = None) -> Choice | None:
        """The option of every unit by the present predictions; the cheapest ones where nothing
        reaches the target, None where nothing reaches both.

        Args:
            spare: where the targets are reached, the loss for which the fastest is wanted that
                still is small enough; None: what loses least is wanted.
        """
        choice = self._best(spare)
        return None if choice is None else self._makeable(choice)

    def _makeable(self, choice: Choice) -> Choice:
        """Without pairs where channels go too: of a narrower layer no rank may be left."""
        chosen = list(zip(self.units, self.options(choice), strict=True))
        narrower: set[str] = set()
        for _, option in chosen:
            narrower.update(option.reader_left)
        found = []
        for index, (unit, option) in zip(choice, chosen, strict=True):
            if option.ratio < 1 and narrower & set(unit.layers):
                kinds = [(other.kind, other.amount, other.ratio) for other in unit.options]
                index = kinds.index((option.kind, 0.0, 1.0))
            found.append(index)
        return tuple(found)

    def _best(self, spare: float | None) -> Choice | None:
        factors = self.factors
        latency, size = self._latency_target(), self._bytes_target()
        if spare is not None or (latency is None and size is None):
            loss = self.allowed if spare is None else spare
            return self._fastest(factors, loss / (1 + self.margin), size)
        if size is None:
            return self._within(factors, 1.0, latency or 0.0)
        smallest = self._within(factors, 0.0, size)
        if latency is None and self._latency(factors, self.parts(smallest)) <= 1:  # no slower
            return smallest
        both = self._within_both(factors, 1.0 if latency is None else latency, size)
        return smallest if both is None and latency is None else both

    def _fastest(self, factors: Factors, loss: float, size: float | None) -> Choice | None:
        """Of the choices that lose no more, the fastest that is small enough. One that is predicted
        to lose as much as a point that lost too much isn't among them.
        """
        lossy = [factors.loss_of(p.parts) for p in self.points if p.loss > max(loss, p.noise)]
        loss = min([loss, *(_CLOSER * predicted for predicted in lossy)])
        for mix in _MIXES[::-1]:
            choice = tuple(self._solve(factors, mix).cheapest(loss))
            small = self._bytes(factors, self.parts(choice))
            if size is None or small <= size * (1 - self.margin):
                return choice
        return None

    def _within(self, factors: Factors, mix: float, target: float) -> Choice:
        """For latency (mix 1) or bytes (mix 0); the knapsack adds up what goes twice, so more is
        asked of it where that is missing.
        """
        frontier = self._solve(factors, mix)
        start = self.base_s / self.original_s if mix else factors.rest / self.original_bytes
        predicted = self._latency if mix else self._bytes
        wanted = asked = target * (1 - self.margin)
        choice: Choice = ()
        for _ in range(ROUNDS):
            found = frontier.within(asked - start) or frontier.within(frontier.least)
            choice = tuple(found or ())
            missing = predicted(factors, self.parts(choice)) - wanted
            if missing <= 0:
                break
            asked -= missing
        return choice

    def _within_both(self, factors: Factors, latency: float, size: float) -> Choice | None:
        """Of several weights between latency and bytes, the choice that keeps both for least."""
        fitting: list[tuple[float, Choice]] = []
        for mix in _MIXES:
            frontier = self._solve(factors, mix)
            for loss in sorted(set(frontier.losses[frontier.losses < float("inf")].tolist())):
                choice = tuple(frontier.cheapest(loss))
                parts = self.parts(choice)
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
                shares.append(mix * time + (1 - mix) * option.own_bytes / self.original_bytes)
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
            shares.append(self.budget.latency_ms / self.latency_ms)
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

    def parts(self, choice: Choice) -> Parts:
        """What the predictions of a choice rest on."""
        return self._parts(self.options(choice))

    def _parts(self, options: Sequence[Option]) -> Parts:
        """Of a layer with fewer inputs and fewer outputs, what goes by both is counted once."""
        left: dict[str, float] = {}
        shares = {}
        for unit, option in zip(self.units, options, strict=True):
            whole_s = max(unit.seconds - option.kind_s, 1e-12)
            own_s = option.size_s - sum(option.reader_s.values())
            shares |= dict.fromkeys(unit.layers, min(max(own_s / whole_s, 0.0), 1.0))
        twice: dict[str, float] = {}
        for option in options:
            both = sum(shares.get(layer, 0.0) * saved for layer, saved in option.reader_s.items())
            name = f"{option.kind} width"
            twice[name] = twice.get(name, 0.0) + both
            for layer, share in option.reader_left.items():
                left[layer] = share * left.get(layer, 1.0)
        return Parts.of(options, twice, left)

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
        factors, parts = self.factors, self.parts(choice)
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

    def next(self, tried: Mapping[Choice, Row], spare: float | None = None) -> Choice | None:
        """A choice that wasn't made yet; None where there is none to learn from.

        Args:
            tried: the rows of those that were made.
            spare: as `choose` takes it.
        """
        for _ in range(ROUNDS):
            choice = self.choose(spare)
            if choice is None or choice not in tried:
                return choice
            row = tried[choice]
            if row["fits"] and (spare is None or row["loss"] <= spare):
                return None
            self.margin += _MORE
        return None


def seconds_of(row: Row, original: Row) -> float:
    """Of a call, by the ratio to the original that it took turns with."""
    return original["latency_ms"]["median"] / 1e3 / row["speedup"]


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
