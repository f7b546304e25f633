"""Which layers a stopwatch finds slower in int8 on this machine."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch

from quantize import surgery
from quantize.compression.int8.layers import Choice, Report, converted
from quantize.nn.timing import Timing, time_layers

ROWS = (1, 16, 256)  # of an input, where no calibration says how many a layer gets
Shapes = Collection[tuple[int, ...]]


def slower(choice: Choice, shapes: Mapping[str, Shapes]) -> Report:
    """The chosen linear layers that are slower in int8 at one of their numbers of rows, with the
    two times.

    Args:
        choice: layers that can become int8.
        shapes: by layer, the shapes of its inputs on calibration; the layer is timed at the
            smallest, the middle and the largest number of rows, without any at ROWS.
    """
    found: Report = {}
    for name, fact in choice.chosen.items():
        if not fact.linear:
            continue
        timings = [time_linear(fact, count) for count in row_counts(shapes.get(name, ()))]
        lost = [str(timing) for timing in timings if timing.int8_s > timing.float_s]
        if lost:
            found[name] = f"int8 is slower here: {', '.join(lost)}"
    return found


def row_counts(shapes: Shapes) -> tuple[int, ...]:
    """The numbers of rows at which a layer is timed, from the shapes of its inputs `[..., K]`."""
    counts = sorted({math.prod(shape[:-1]) for shape in shapes} - {0})
    if not counts:
        return ROWS
    return tuple(sorted({counts[0], counts[len(counts) // 2], counts[-1]}))


def time_linear(fact: surgery.Facts, count: int) -> Timing:
    """Of a linear layer on so many rows, in float and in int8; on the CPU."""
    module: Any = fact.module
    weight = module.weight
    inputs = weight.shape[0 if fact.transposed else 1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, inputs, generator=generator, dtype=torch.float32).to(weight.dtype)
    return time_layers(module, partial(converted, fact), x)
