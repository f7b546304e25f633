"""Which channels of a layer's input count in float, and which factors even out the others.

A row is quantized in equal steps, so one channel that holds most of its energy leaves few steps for
all others. For every layer some candidates are tried on rows of calibration, from none to four
channels in float, with factors or without; the next one is taken where it brings the layer's output
clearly closer. A candidate is made from half of the rows and judged on the others: a channel that
happens to be small in a few rows would get a factor that ruins every row in which it is large.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
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


@dataclass
class _Inputs:
    """Of a layer: up to ROWS rows, and the largest number of each channel in all rows."""

    rows: Tensor  # float32 [R, K]
    largest: Tensor  # float32 [K]

    def add(self, rows: Tensor) -> None:
        """Count rows of one more call, float32 [N, K]."""
        self.largest = self.largest.maximum(rows.abs().amax(0))
        left = ROWS - len(self.rows)
        if left > 0:
            step = max(1, len(rows) // left)
            self.rows = torch.cat((self.rows, rows[::step][:left]))


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
    for name, inputs in seen.items():
        module: Any = layers[name]
        weight = module.weight.t() if choice.chosen[name].transposed else module.weight
        plan = _best(inputs, weight.detach().float().cpu())
        if plan is not None:
            found[name] = plan
    return found


@torch.no_grad()
def _best(inputs: _Inputs, weight: Tensor) -> Plan | None:
    known, unseen = inputs.rows[::2], inputs.rows[1::2]
    if not len(unseen):
        return None
    expected = F.linear(unseen, weight)
    plain = Int8Linear.from_weight(weight)
    least = calibrating.relative_error([plain(unseen)], [expected])
    best = None
    candidates = _candidates(known.abs().amax(0), weight)
    for which, plan in enumerate(candidates):
        error = calibrating.relative_error([plan.made(weight, None)(unseen)], [expected])
        if error < HELPS * least:
            best, least = which, error
    return None if best is None else list(_candidates(inputs.largest, weight))[best]


def _candidates(largest: Tensor, weight: Tensor) -> Iterator[Plan]:
    """The cheapest first. largest: of each channel of the inputs."""
    order = largest.argsort(descending=True)
    size = weight.abs().amax(0)
    ones = torch.ones_like(largest)
    silent = largest == 0  # such a channel says nothing of what it will be
    typical = largest.sum() / (~silent).sum().clamp_min(1)
    reach = torch.where(silent, typical, largest)
    even = size.clamp_min(1e-5) ** (1 - STRENGTH) / reach.clamp_min(1e-5) ** STRENGTH
    for count in COUNTS:
        channels = order[: min(count, len(order))].clone()
        if count:
            yield Plan(ones, channels)
        yield Plan(even, channels)


def _inputs(
    model: nn.Module, calibration: Iterable[Any], layers: Mapping[str, nn.Module]
) -> dict[str, _Inputs]:
    """What each layer gets."""
    found: dict[str, _Inputs] = {}

    def see(name: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            rows = x.detach().reshape(-1, x.shape[-1]).float().cpu()
            if not len(rows):
                return
            if name not in found:
                found[name] = _Inputs(rows[:0], torch.zeros(x.shape[-1], dtype=torch.float32))
            found[name].add(rows)

        return note

    hooks = [
        layer.register_forward_pre_hook(see(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    calibrating.run_all(model, calibration, hooks)
    return found
