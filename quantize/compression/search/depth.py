"""Which blocks a model can do without, as its metric tells."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

from quantize.compression.blocks import drop_blocks, find_blocks
from quantize.compression.search.trial import Trial


class Losses:
    """What a model loses without some of its blocks.

    Args:
        trial: of the model.
        is_over: whether no time is left.
    """

    def __init__(self, trial: Trial, is_over: Callable[[], bool]) -> None:
        self.trial, self.is_over = trial, is_over

    def one_by_one(self, keep: Callable[[Callable[[], None]], None]) -> dict[str, float]:
        """By block, the loss without it alone, known or measured now.

        Args:
            keep: called with what writes them down.
        """
        trial = self.trial
        if self.is_over():
            return {}
        blocks = find_blocks(trial.model, trial.example_inputs)
        known = trial.points.known.get("blocks", {})
        if blocks and not known:
            trial.say(f"leaving out each of {len(blocks)} blocks")
            losses = {name: self.without([name]) for name in blocks}
            known = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
            if not self.is_over():
                keep(partial(trial.points.keep_known, "blocks", known))
        return known

    def dispensable(self, known: Mapping[str, float], most: float, needed: int) -> list[str]:
        """The blocks to leave out, the least important first; one stays.

        Args:
            known: by block, the loss without it alone.
            most: what all of them together may lose.
            needed: so many of them may lose what the budget allows.
        """
        found: list[str] = []
        for name in sorted(known, key=lambda name: known[name])[:-1]:
            limit = most if len(found) >= needed else self.trial.allowed
            loss = max(known[name], self.without([*found, name]))
            if loss > limit or not math.isfinite(loss):
                break
            found.append(name)
        return found

    def without(self, blocks: list[str]) -> float:
        """Of the metric; infinite where the model fails without them, or no time is left."""
        if self.is_over():
            return math.inf
        try:
            return self.trial.judge.score(drop_blocks(self.trial.model, blocks)).loss
        except Exception as error:  # of somebody's model or metric
            self.trial.say(f"not without {blocks[-1]}: {' '.join(str(error).split())[:150]}")
            return math.inf
