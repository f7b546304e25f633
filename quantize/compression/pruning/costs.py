"""What removing channels would cost, group by group, before anything is removed.

The groups are those that `prune_ln_structured` finds, and the costs are those that it ranks by, so
a search can weigh them against other ways to make a layer smaller. Left out: groups that no layer
of their own names, whose readers can't be refitted, or whose readers the output doesn't depend on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from quantize import surgery
from quantize.compression.pruning import budget, scores
from quantize.compression.pruning.choose import choose, refuse_infinite, refuse_unfit, savable
from quantize.compression.pruning.cut import Owners, layers_of, owners
from quantize.compression.pruning.exporting import graph_of
from quantize.compression.pruning.follow import follow
from quantize.compression.pruning.groups import Group, find_groups
from quantize.compression.pruning.readers import (
    by_readers,
    find_readers,
    reached_groups,
    survey_readers,
)
from quantize.saying import Say, silent


@dataclass(frozen=True)
class Removable:
    """One group of channels that go together.

    Args:
        name: a layer that names this group alone in `amount`.
        units: how many there are.
        outputs: by layer, the output channels that go with a unit.
        inputs: by layer, the input channels (columns of a linear layer) that go with a unit.
        costs: of removing 0, 1, ... units, with the readers refitted: squared changes of the
            model's output (see `scores.reconstruction`), summed over the rows seen, float64.
        kept: gives for a fraction to remove the number of units that `prune_ln_structured` keeps.
    """

    name: str
    units: int
    outputs: dict[str, int]
    inputs: dict[str, int]
    costs: Tensor
    kept: Callable[[float], int]


def removable(
    model: nn.Module,
    example_inputs: Any,
    calibration: Iterable[Any],
    say: Say = silent,
) -> list[Removable]:
    """The groups of a model and what their channels cost.

    Args:
        model: any module; it stays as it is.
        example_inputs, calibration, say: as in `prune_ln_structured`.

    Raises:
        ValueError: as `prune_ln_structured`: a model that can't be exported, nothing to prune.
    """
    work = surgery.shell(model).eval()
    refuse_unfit(work)
    trace = follow(graph_of(model, work, example_inputs), work)
    groups, stuck = find_groups(trace.labels)
    left: dict[str, str] = {}
    wanted = choose(work, groups, stuck, {"*": 0.5}, (), left)
    wanted = savable(work, wanted, left)
    refuse_infinite(work, wanted)
    readers = find_readers(work, wanted)
    survey = survey_readers(work, readers, calibration, say)
    wanted = reached_groups(work, wanted, survey.reached, left)
    counts: Counter[str] = Counter()
    holders = owners(work)
    for group in groups:
        counts.update(set(layers_of(holders, group)))
    found = []
    for group, costs in zip(wanted, by_readers(wanted, survey, _costs), strict=True):
        name = _own_name(holders, group, counts)
        if name is not None and costs is not None:
            found.append(_removable(holders, group, name, costs))
    return found


def _own_name(holders: Owners, group: Group, counts: Counter[str]) -> str | None:
    return next((name for name in layers_of(holders, group) if counts[name] == 1), None)


def _costs(group: Group, readers: list[scores.Reader]) -> Tensor | None:
    """None where they can't be compared with those of other groups."""
    if any(reader.metric is None for reader in readers):
        return None
    return scores.reconstruction(readers, budget.deepest(group, None))[1]


def _removable(holders: Owners, group: Group, name: str, costs: Tensor) -> Removable:
    outputs: dict[str, int] = {}
    for key in group.outputs:
        place, _, local = holders(key[0])[0]
        if local == "weight":
            outputs[place] = group.places[key].shape[1]
    inputs = {place: group.places[key].shape[1] for place, _, key in group.readers}

    def kept(amount: float) -> int:
        return budget.units_kept(group, amount, None)

    return Removable(name, group.units, outputs, inputs, costs, kept)
