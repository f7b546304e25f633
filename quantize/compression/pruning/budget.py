"""How many units of each group stay: what was asked for, rounded; shared out between groups by what
their removal costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from quantize.compression.pruning.groups import Group

LEAST = 1 / 8  # of a group's units stay, whatever the others can spare


def round_step(group: Group, round_to: int | None) -> int:
    """Units are kept in multiples of this, so that widths are multiples of the rounding."""
    size = group.unit_size()
    width = group.units * size
    if round_to is None:
        fitting = [r for r in (16, 8, 4, 2, 1) if r * 8 <= width]
        round_to = fitting[0] if fitting else 1
    if size >= round_to:
        return 1
    return round_to // math.gcd(round_to, size)


def units_kept(group: Group, amount: float, round_to: int | None) -> int:
    """How many units stay: near (1 - amount) of them, a multiple of the rounding, never none."""
    if not amount:
        return group.units
    step = round_step(group, round_to)
    wanted = group.units * (1 - amount)
    keep = round(wanted / step + 1e-9) * step
    return min(group.units, max(step, keep))


def alike(groups: Sequence[Group]) -> list[list[int]]:
    """Groups, by number, that may give to each other: asked for together, with as many units of as
    many parameters each.
    """
    found: dict[tuple, list[int]] = {}
    for i, group in enumerate(groups):
        kind = (group.asked, group.units, group.unit_size(), len(group.outputs), group.parameters)
        found.setdefault(kind, []).append(i)
    return list(found.values())


def deepest(group: Group, round_to: int | None) -> int:
    """The most units that sharing out may take from a group."""
    step = round_step(group, round_to)
    least = math.ceil(group.units * LEAST / step) * step
    stays = max(step, least)
    return max(0, group.units - stays)


def share_out(costs: Sequence[Tensor], total: int, step: int) -> list[int]:
    """How many units each group gives, in multiples of `step` and `total` together, for the least
    sum of costs.

    costs[i][k] is what it costs to remove k units from group i. A greedy walk along the lower
    convex hull of every curve, so that a cheap stretch behind an expensive one is seen.
    """
    given = [0] * len(costs)
    curves = [cost.tolist() for cost in costs]
    while (left := total - sum(given)) >= step:
        best: tuple[float, int, int] | None = None
        for i, cost in enumerate(curves):
            now = given[i]
            most = min(len(cost) - 1, now + left)
            for k in range(now + step, most + 1, step):
                slope = (cost[k] - cost[now]) / (k - now)
                if best is None or slope < best[0]:
                    best = (slope, i, k)
        if best is None:
            break
        given[best[1]] = best[2]
    return given
