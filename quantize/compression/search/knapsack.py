"""The choice of one option for each unit that loses least in sum within a cost: a multiple-choice
knapsack, solved by dynamic programming over a grid of costs.

Exact up to the grid: costs are rounded to its steps, up and down by turns, so that a sum of many is
off by less than a step for every unit and the whole frontier is there at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STEPS = 1000  # of the grid


@dataclass(frozen=True)
class Frontier:
    """The least loss for every cost.

    Args:
        step: cost of a step of the grid.
        least: of all units at their cheapest, subtracted from all costs.
        losses: [STEPS + 1], of the best choice that costs up to so many steps; infinite where
            there is none.
        choices: per unit [STEPS + 1], the option that this choice takes.
        places: per unit and option, its cost in steps.
    """

    step: float
    least: float
    losses: np.ndarray
    choices: list[np.ndarray]
    places: list[list[int]]

    def within(self, cost: float) -> list[int] | None:
        """The option of each unit that loses least in sum at no more than this cost; None where
        nothing is so cheap.
        """
        steps = math.floor((cost - self.least) / self.step + 1e-9)
        return self._walk(min(steps, len(self.losses) - 1)) if steps >= 0 else None

    def cheapest(self, loss: float) -> list[int]:
        """The cheapest choice that loses no more than this; the one that loses least where none
        does.
        """
        fitting = np.flatnonzero(self.losses <= loss)
        return self._walk(int(fitting[0]) if len(fitting) else len(self.losses) - 1)

    def _walk(self, left: int) -> list[int]:
        """From the last unit back to the first."""
        chosen = []
        for choice, places in zip(reversed(self.choices), reversed(self.places), strict=True):
            option = int(choice[left])
            chosen.append(option)
            left -= places[option]
        return chosen[::-1]


def solve(costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]]) -> Frontier:
    """The frontier of all choices.

    Args:
        costs: of each unit's options, any finite numbers.
        losses: of each unit's options.

    Raises:
        ValueError: no unit, or one without an option.
    """
    if not costs or not all(costs):
        raise ValueError("a knapsack needs units, each with an option")
    cheapest = [min(options) for options in costs]
    spread = sum(max(options) for options in costs) - sum(cheapest)
    step = max(spread, 1e-12) / STEPS
    places = [
        [round((cost - least) / step) for cost in options]
        for options, least in zip(costs, cheapest, strict=True)
    ]
    best = np.zeros(STEPS + 1)
    choices = []
    for options, unit_losses in zip(places, losses, strict=True):
        rows = np.full((len(options), STEPS + 1), np.inf)
        for row, place, loss in zip(rows, options, unit_losses, strict=True):
            if place <= STEPS:
                row[place:] = best[: STEPS + 1 - place] + loss
        choice = rows.argmin(0)
        best = np.take_along_axis(rows, choice[None], 0)[0]
        choices.append(choice)
    return Frontier(step, sum(cheapest), best, choices, places)
