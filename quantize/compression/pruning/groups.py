"""From labels to units and groups: what can be removed, and what goes with it.

A unit is a set of channels that only go together: a neuron, a convolution's channel with everything
tied to it by residual adds, an attention head, a key-value head with its queries. A group is all
units of one kind: some fraction of it goes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quantize.compression.pruning.labels import Key, Labels, compress, varying

Unit = dict[Key, list[int]]  # what goes together: indices along dimensions of tensors


@dataclass
class Group:
    """Units that cut the same dimensions by the same number of indices each.

    `places[key]` is [units, indices per unit]: what each unit takes out of that dimension of that
    tensor.
    """

    places: dict[Key, Tensor]
    outputs: list[Key]  # dimensions that are output channels of a layer, in the order of the graph
    inputs: dict[Key, str]  # dimensions that are summed over, and the module whose forward does it
    pinned: int = 0  # channels of the first output that can't go
    parameters: int = 0  # that go with one unit, when nothing else is pruned
    amount: float = 0.0  # fraction of the units to remove
    asked: str = ""  # what named the group in `amount`
    # units, by number
    removed: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    # that sum over its channels, seen in calibration
    readers: list[tuple[str, nn.Module, Key]] = field(default_factory=list)

    @property
    def units(self) -> int:
        return next(iter(self.places.values())).shape[0]

    def unit_size(self) -> int:
        """Channels of a unit, where it has the fewest (the head size for a fused QKV)."""
        layers = {*self.outputs, *self.inputs}
        return min(places.shape[1] for key, places in self.places.items() if key in layers)

    def width(self, labels: Labels) -> int:
        """Channels of the dimension that the units cut, pinned ones included."""
        key = self.outputs[0]
        return labels.shapes[key[0]][key[1]]


class Ties:
    """Connected labels. `root[label]` is the smallest label tied to it; `reason[root]` says why it
    can't be removed.
    """

    def __init__(self, labels: Labels):
        self.labels = labels
        self.root = torch.arange(labels.count)
        self._connect()
        while self._square():
            self._connect()
        self.reason: dict[int, str] = {}
        for pinned, why in labels.pins:
            for root in self.root[pinned].unique().tolist():
                self.reason.setdefault(root, why)

    def _free(self) -> Tensor:
        """Which labels can be removed: those that are tied to no pinned one, [labels]."""
        pinned = torch.zeros(self.labels.count, dtype=torch.bool)
        for labels, _ in self.labels.pins:
            pinned[self.root[labels]] = True
        return ~pinned[self.root]

    def _connect(self) -> None:
        """Connected components by label propagation with pointer jumping."""
        none = torch.empty(0, 2, dtype=torch.long)
        a, b = torch.cat([none, *self.labels.edges]).unbind(1)
        while True:
            low = torch.minimum(self.root[a], self.root[b])
            before = self.root.clone()
            self.root.scatter_reduce_(0, before[a], low, "amin")
            self.root.scatter_reduce_(0, before[b], low, "amin")
            self.root = self.root[self.root]
            if torch.equal(before, self.root):
                return

    def _square(self) -> bool:
        """A tensor must stay rectangular: where free labels differ along two dimensions, tie along
        the shorter one.

        Some line along that dimension then holds two free labels, which become one, or a free label
        beside elements that stay, which pin it. So every step leaves fewer free labels than before,
        and the steps end.
        """
        free = self._free()
        for labels in self.labels.ragged:
            known = labels.clamp(min=0)
            can_go = (labels >= 0) & free[known]
            roots = compress(torch.where(can_go, self.root[known], -1))
            dims = sorted(varying(roots), key=lambda d: roots.shape[d])
            if len(dims) > 1:
                self.labels.collapse(roots, dims[0], "it would leave a ragged tensor")
                return True
        return False


def find_groups(labels: Labels) -> tuple[list[Group], dict[Key, str]]:
    """Groups in the order of the graph, and for every output dimension with channels that stay, the
    reason.
    """
    ties = Ties(labels)
    members: dict[int, Unit] = {}
    stuck: dict[Key, str] = {}
    pinned: Counter[Key] = Counter()
    for key, own in labels.keys.items():
        for index, root in enumerate(ties.root[own].tolist()):
            if root not in ties.reason:
                unit = members.setdefault(root, {})
                unit.setdefault(key, []).append(index)
            elif key in labels.outputs:
                stuck.setdefault(key, ties.reason[root])
                pinned[key] += 1
    kinds: dict[tuple, list[Unit]] = {}
    for unit in members.values():
        if any(key in labels.outputs for key in unit):
            kind = tuple((key, len(indices)) for key, indices in unit.items())
            kinds.setdefault(kind, []).append(unit)
    groups = [_group(units, labels, pinned) for units in kinds.values()]
    order = {key: i for i, key in enumerate(labels.outputs)}
    return sorted(groups, key=lambda group: order[group.outputs[0]]), stuck


def _group(units: list[Unit], labels: Labels, pinned: Mapping[Key, int]) -> Group:
    """Units that hold as many channels of the same dimensions each."""
    places = {key: torch.tensor([unit[key] for unit in units]) for key in units[0]}
    outputs = [key for key in labels.outputs if key in places]
    inputs = {key: labels.inputs[key] for key in places if key in labels.inputs}
    parameters = 0
    for (name, dim), indices in units[0].items():
        shape = labels.shapes[name]
        parameters += len(indices) * math.prod(shape) // shape[dim]
    return Group(places, outputs, inputs, pinned[outputs[0]], parameters)
