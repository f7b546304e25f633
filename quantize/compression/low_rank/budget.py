"""From a budget to a rank for every layer: what the user gave, checked, and shared out over the
layers.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from quantize import calibration as calibrate
from quantize.compression.low_rank import maths, timing
from quantize.nn import low_rank as pairs

Budget = float | int | Mapping[str, float | int]

# Share of a layer's parameters up to which a pair takes no longer than the layer in a batch, where
# timing says nothing else. On an AVX-512 CPU, 2 threads, 256 to 2048 rows, widths 128 to 2048: 0.98
# to 1.35 times as fast at 0.8, 0.75 to 1.14 at 1. A global budget, which is free to choose, keeps
# layers above it whole.
QUICK = max(timing.SHARES)


def read_budget(ratio: Any, energy: Any, rank: Any) -> tuple[str, Any]:
    """The one budget that was given, by kind (default: ratio 0.5), with its values in range."""
    given = {
        k: v for k, v in (("ratio", ratio), ("energy", energy), ("rank", rank)) if v is not None
    }
    if len(given) > 1:
        raise ValueError(
            f"give one budget, not {' and '.join(f'{k}={v!r}' for k, v in given.items())}"
        )
    kind, value = next(iter(given.items()), ("ratio", 0.5))
    for v in value.values() if isinstance(value, Mapping) else (value,):
        wanted = int if kind == "rank" else (int, float)
        if isinstance(v, bool) or not isinstance(v, wanted):
            raise TypeError(
                f"{kind} must be {'an int' if kind == 'rank' else 'a number'} or a dict of "
                f"them, got {v!r}"
            )
        if not (v >= 1 if kind == "rank" else 0 < v <= 1):
            raise ValueError(
                f"{kind}={v!r} is outside "
                f"{'[1, width of the layer]' if kind == 'rank' else '(0, 1]'}"
            )
    return kind, value


def per_layer(
    kind: str, value: Budget, layers: Mapping[str, nn.Module], model: nn.Module
) -> dict[str, float | int]:
    """The value for each layer that has one; the first matching entry of a dict counts, exact names
    before globs.
    """
    if not isinstance(value, Mapping):
        values = dict.fromkeys(layers, value)
    else:
        for pattern in value:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in layers):
                raise ValueError(
                    f"{kind} names {pattern!r}, which is no layer of {type(model).__name__} "
                    f"that can be factorized"
                )
        values = {}
        for name in layers:
            pattern = (
                name
                if name in value
                else next((p for p in value if fnmatch.fnmatchcase(name, p)), None)
            )
            if pattern is not None:
                values[name] = value[pattern]
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
    return 16 if narrow >= 512 else 8 if narrow >= 64 else 4 if narrow >= 32 else 1


def choose_ranks(
    kind: str,
    value: Budget,
    values: Mapping[str, float | int],
    layers: Mapping[str, nn.Module],
    spectra: Mapping[str, torch.Tensor],
    allowed: Mapping[str, Sequence[int]],
    *,
    weighted: bool,
) -> dict[str, int | None]:
    """Rank per layer; None where the layer stays as it is."""
    shapes: dict[str, Any] = {
        name: tuple(pairs.matrix(layer).shape) for name, layer in layers.items()
    }
    if kind == "ratio" and not isinstance(value, Mapping):
        if not weighted:  # spectra of weights alone can't be compared: each layer counts the same
            spectra = {name: s / s.norm().clamp_min(1e-300) for name, s in spectra.items()}
        if weighted or value > QUICK:
            return _global_ranks(float(value), shapes, spectra, allowed)
    ranks: dict[str, int | None] = {}
    for name, (m, k) in shapes.items():
        v = values[name]
        if kind == "rank":
            r = int(v)
        elif kind == "energy":
            unit = rank_unit((m, k))
            r = math.ceil(maths.rank_for_energy(spectra[name], v) / unit) * unit
        else:
            r = math.floor(v * m * k / (m + k) + 1e-9)
            unit = rank_unit((m, k))
            r = max(r // unit * unit, min(r, unit)) if v < 1 else min(m, k)
            if r < 1:
                raise ValueError(
                    f"ratio={v} leaves nothing of layer {name!r} ({m} x {k}): rank 1 keeps "
                    f"{(m + k) / (m * k):.3f}"
                )
        ranks[name] = r if r in allowed[name] else None
    return ranks


def allowed_ranks(
    model: nn.Module,
    batches: Iterable[Any] | None,
    layers: Mapping[str, nn.Module],
    *,
    global_ratio: bool,
    only_faster: bool | None,
) -> dict[str, list[int]]:
    """Ranks, rising, at which each layer gets smaller and not slower; empty where timing finds
    none.

    only_faster: True times every layer, None those that take long enough to tell, False none.
    global_ratio: layers that aren't timed are held to `QUICK` as far as they can be.
    """
    shapes: Mapping[str, Sequence[int]] = {}
    if only_faster is not False and batches is not None:
        originals = {name: model.get_submodule(name) for name in layers}
        shapes = calibrate.trace_calls(model, next(iter(batches)), originals).shapes
    allowed = {}
    for name, layer in layers.items():
        m, k = pairs.matrix(layer).shape
        smaller = maths.candidate_ranks(m, k, 1)
        timed = (
            timing.quick_share(layer, shapes[name], always=bool(only_faster))
            if name in shapes
            else None
        )
        share = timed if timed is not None else QUICK if global_ratio else 1.0
        fast = [r for r in smaller if r * (m + k) <= share * m * k]
        allowed[name] = fast or (smaller if timed is None else [])
    return allowed


def _global_ranks(
    ratio: float,
    shapes: Mapping[str, tuple[int, int]],
    spectra: Mapping[str, torch.Tensor],
    allowed: Mapping[str, Sequence[int]],
) -> dict[str, int | None]:
    total = sum(m * k for m, k in shapes.values())
    budget = math.floor(ratio * total + 1e-9)
    for fine in (False, True):  # ranks below the unit only where the budget can't be met otherwise
        options = {
            name: maths.choices(
                spectra[name],
                shape,
                (not fine and [r for r in allowed[name] if r % rank_unit(shape) == 0])
                or allowed[name],
            )
            for name, shape in shapes.items()
        }
        least = sum(choice[0].parameters for choice in options.values())
        if least <= budget:
            return maths.allocate(options, budget)
    raise ValueError(
        f"ratio={ratio} can't be reached: rank 1 everywhere keeps {least / total:.3f} of the "
        f"parameters"
    )
