"""What can be done to a part of a model: `units` finds it, `layered` chooses among it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from quantize.compression.search.times import FLOAT


@dataclass(frozen=True)
class Option:
    """One way to have a unit.

    Args:
        kind: how its layers are stored.
        amount: fraction of its channels that go.
        ratio: fraction of its layers' parameters that pairs of low rank keep.
        kind_s: seconds that the kind saves of a call at full size.
        size_s: seconds that fewer channels or ranks save beyond that.
        rounding: what the kind loses.
        removal: what the channels or ranks that go lose.
        bytes: of each of its layers.
        reader_s: of `size_s`, what each layer of another unit saves that reads these channels.
        reader_left: the share of its inputs that each of these layers keeps.
        reader_bytes: what these layers save at least, whatever their kind.
    """

    kind: str = FLOAT
    amount: float = 0.0
    ratio: float = 1.0
    kind_s: float = 0.0
    size_s: float = 0.0
    rounding: float = 0.0
    removal: float = 0.0
    bytes: Mapping[str, float] = field(default_factory=dict)
    reader_s: Mapping[str, float] = field(default_factory=dict)
    reader_left: Mapping[str, float] = field(default_factory=dict)
    reader_bytes: float = 0.0

    @property
    def own_bytes(self) -> float:
        """Of its layers, less what others save: what a sum over units counts."""
        return sum(self.bytes.values()) - self.reader_bytes

    def slower(self, times: float) -> Option:
        """The option where everything takes so many times as long."""
        reader_s = {name: times * seconds for name, seconds in self.reader_s.items()}
        return replace(
            self, kind_s=times * self.kind_s, size_s=times * self.size_s, reader_s=reader_s
        )


@dataclass(frozen=True)
class Unit:
    """A part of a model that is decided about.

    Args:
        name: that names its channels in `amount`, or its layer.
        layers: those whose kind it decides.
        options: the first one is the layers as they are.
        seconds: that its layers take in a call as they are.
    """

    name: str
    layers: tuple[str, ...]
    options: tuple[Option, ...]
    seconds: float

    def slower(self, times: float) -> Unit:
        """The unit where everything takes so many times as long."""
        options = tuple(option.slower(times) for option in self.options)
        return replace(self, options=options, seconds=times * self.seconds)


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
