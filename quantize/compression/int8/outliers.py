"""Which channels of a layer's input count in float, and which factors even out the others.

A row is quantized in equal steps, so one channel that holds most of its energy leaves few steps for
all others. For every layer some candidates are tried on rows of calibration, from none to four
channels in float, with factors or without; the next one is taken where it brings the layer's output
clearly closer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantize import calibration as calibrating
from quantize.compression.int8.layers import Choice, Plan
from quantize.compression.smooth import STRENGTH
from quantize.nn.int8 import Int8Linear

HELPS = 0.7  # a candidate's error over that of a cheaper one, at most
COUNTS = (0, 1, 4)  # channels in float
ROWS = 128  # of a layer's inputs that candidates are tried on


def find_plans(model: nn.Module, choice: Choice, calibration: Iterable[Any]) -> dict[str, Plan]:
    """By layer, what helps it; layers that none helps are left out, and so are those that share
    their weight with a table.
    """
    layers = {
        name: fact.module
        for name, fact in choice.chosen.items()
        if fact.linear and len(fact.holders) < 2
    }
    seen = _inputs(model, calibration, layers)
    found = {}
    for name, x in seen.items():
        module: Any = layers[name]
        weight = module.weight.t() if choice.chosen[name].transposed else module.weight
        plan = _best(x, weight.detach().float())
        if plan is not None:
            found[name] = plan
    return found


@torch.no_grad()
def _best(x: Tensor, weight: Tensor) -> Plan | None:
    expected = F.linear(x, weight)
    plain = Int8Linear.from_weight(weight)
    least = calibrating.relative_error([plain(x)], [expected])
    found = None
    for plan in _candidates(x, weight):
        error = calibrating.relative_error([plan.made(weight, None)(x)], [expected])
        if error < HELPS * least:
            found, least = plan, error
    return found


def _candidates(x: Tensor, weight: Tensor) -> Iterator[Plan]:
    """The cheapest first."""
    largest = x.abs().amax(0)
    order = largest.argsort(descending=True)
    size = weight.abs().amax(0)
    ones = torch.ones_like(largest)
    even = size.clamp_min(1e-5) ** (1 - STRENGTH) / largest.clamp_min(1e-5) ** STRENGTH
    for count in COUNTS:
        channels = order[: min(count, len(order))].clone()
        if count:
            yield Plan(ones, channels)
        yield Plan(even, channels)


def _inputs(
    model: nn.Module, calibration: Iterable[Any], layers: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """Up to ROWS rows of what each layer gets, float32, spread over a batch's rows."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}

    def see(name: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            rows = x.detach().reshape(-1, x.shape[-1])
            left = ROWS - sum(map(len, found[name]))
            if left > 0 and len(rows):
                step = max(1, len(rows) // left)
                found[name].append(rows[::step][:left].float().cpu().clone())

        return note

    hooks = [
        layer.register_forward_pre_hook(see(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    with calibrating.watching(hooks, model), torch.no_grad():
        for batch in calibration:
            calibrating.call(model, batch)
    return {name: torch.cat(rows) for name, rows in found.items() if rows}
