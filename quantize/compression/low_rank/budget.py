"""From a budget to a rank for every layer: what the user gave, checked, and shared out over the
layers.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from quantize import check
from quantize.compression.low_rank import maths, timing
from quantize.nn import low_rank as pairs

# Share of a layer's parameters up to which a pair takes no longer than the layer in a batch, where
# timing says nothing else. On an AVX-512 CPU, 2 threads, 256 to 2048 rows, widths 128 to 2048: 0.98
# to 1.35 times as fast at 0.8, 0.75 to 1.14 at 1. A global budget, which is free to choose, keeps
# layers above it whole.
QUICK = max(timing.SHARES)


@dataclass
class Budget:
    """What may be kept: kind is "ratio" or "rank"; value the number or dict as given;
    values what each layer gets of it.
    """

    kind: str
    value: Any
    values: Mapping[str, float | int]

    @property
    def by_layer(self) -> bool:
        """Is it given layer by layer?"""
        return self.kind == "rank" or isinstance(self.value, Mapping)

    @property
    def keeps_all(self) -> bool:
        return self.kind == "ratio" and all(value == 1 for value in self.values.values())


def read_budget(ratio: Any, rank: Any) -> tuple[str, Any]:
    """The one budget that was given, by kind (default: ratio 0.5), with its values in range."""
    if ratio is not None and rank is not None:
        raise ValueError(f"give one budget, not ratio={ratio!r} and rank={rank!r}")
    if rank is None:
        return "ratio", check.shares("ratio", 0.5 if ratio is None else ratio, "(0, 1]")
    for value in rank.values() if isinstance(rank, Mapping) else (rank,):
        check.count("rank", value)
    return "rank", rank


def per_layer(
    kind: str, value: Any, layers: Mapping[str, nn.Module], model: nn.Module
) -> dict[str, float | int]:
    """The value for each layer that has one; the first matching entry of a dict counts, exact names
    before globs.
    """
    values: dict[str, Any] = {}
    if not isinstance(value, Mapping):
        values = dict.fromkeys(layers, value)
    else:
        for pattern in value:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in layers):
                raise ValueError(
                    f"{kind} names {pattern!r}, which is no layer of {type(model).__name__} "
                    f"that can be factorized"
                )
        for name in layers:
            matching = [p for p in value if p == name]
            matching += [p for p in value if fnmatch.fnmatchcase(name, p)]
            if matching:
                values[name] = value[matching[0]]
    if kind == "rank":
        for name, r in values.items():
            width = min(pairs.matrix(layers[name]).shape)
            if r > width:
                raise ValueError(
                    f"rank={r} is above the rank {width} of layer {name!r}; give a dict, or "
                    f"skip the layer"
                )
    return values


def rank_unit(shape: tuple[int, int]) -> int:
    """Ranks are multiples of this: what vector units like, as far as the layer's width leaves a
    choice.
    """
    narrow = min(shape)
    if narrow >= 512:
        return 16
    if narrow >= 64:
        return 8
    return 4 if narrow >= 32 else 1


def choose_ranks(
    budget: Budget,
    layers: Mapping[str, nn.Module],
    spectra: Mapping[str, Tensor],
    allowed: Mapping[str, Sequence[int]],
    *,
    weighted: bool,
) -> dict[str, int | None]:
    """Rank per layer; None where the layer stays as it is.

    weighted: the spectra are in one unit of loss.
    """
    shapes: dict[str, Any] = {name: tuple(pairs.matrix(m).shape) for name, m in layers.items()}
    if budget.kind == "ratio" and not budget.by_layer:
        if not weighted:  # spectra of weights alone can't be compared: each layer counts the same
            spectra = {name: s / s.norm().clamp_min(1e-300) for name, s in spectra.items()}
        if weighted or budget.value > QUICK:
            return _global_ranks(float(budget.value), shapes, spectra, allowed)
    ranks: dict[str, int | None] = {}
    for name, shape in shapes.items():
        value = budget.values[name]
        if budget.kind == "rank":
            rank = int(value)
        else:
            rank = rank_for_ratio(value, shape)
            if rank < 1:
                m, k = shape
                raise ValueError(
                    f"ratio={value} leaves nothing of layer {name!r} ({m} x {k}): rank 1 keeps "
                    f"{(m + k) / (m * k):.3f}"
                )
        ranks[name] = rank if rank in allowed[name] else None
    return ranks


def rank_for_ratio(ratio: float, shape: tuple[int, int]) -> int:
    """The largest rank that keeps no more than that of a layer's parameters; 0 where none does."""
    m, k = shape
    rank = math.floor(ratio * m * k / (m + k) + 1e-9)
    if ratio == 1:
        return min(m, k)
    unit = rank_unit(shape)
    return max(rank // unit * unit, min(rank, unit))


def allowed_ranks(
    budget: Budget,
    layers: Mapping[str, nn.Module],
    shapes: Mapping[str, Sequence[int]],
    *,
    always: bool,
) -> dict[str, list[int]]:
    """Ranks, rising, at which each layer gets smaller and not slower; empty where timing finds
    none.

    A budget for all layers together holds those that aren't timed to `QUICK` as far as they can be.

    shapes: of the inputs of layers that are timed. always: time those too that take too little to
        tell.
    """
    untimed = QUICK if budget.kind == "ratio" and not budget.by_layer else 1.0
    allowed = {}
    for name, layer in layers.items():
        m, k = pairs.matrix(layer).shape
        smaller = maths.candidate_ranks(m, k)
        timed = None
        if name in shapes:
            timed = timing.quick_share(layer, shapes[name], always=always)
        share = untimed if timed is None else timed
        fast = [r for r in smaller if r * (m + k) <= share * m * k]
        allowed[name] = fast or ([*smaller] if timed is None else [])
    return allowed


def _global_ranks(
    ratio: float,
    shapes: Mapping[str, tuple[int, int]],
    spectra: Mapping[str, Tensor],
    allowed: Mapping[str, Sequence[int]],
) -> dict[str, int | None]:
    total = sum(m * k for m, k in shapes.values())
    budget = math.floor(ratio * total + 1e-9)
    for fine in (False, True):  # ranks below the unit only where the budget can't be met otherwise
        options = {}
        for name, shape in shapes.items():
            unit = 1 if fine else rank_unit(shape)
            ranks = [r for r in allowed[name] if r % unit == 0] or allowed[name]
            options[name] = maths.choices(spectra[name], shape, ranks)
        least = sum(choice[0].parameters for choice in options.values())
        if least <= budget:
            return maths.allocate(options, budget)
    raise ValueError(
        f"ratio={ratio} can't be reached: rank 1 everywhere keeps {least / total:.3f} of the "
        f"parameters"
    )
