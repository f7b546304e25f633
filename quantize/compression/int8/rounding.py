"""The weights of LSTMs and GRUs, rounded for the inputs and states that they multiply.

Errors of a state are carried from step to step, so rounding each weight to its nearest value costs
a recurrent layer more than others. A layer's int8 form is run on what the float layer gets on
calibration, and each weight is rounded by GPTQ for the rows that it then multiplies.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from quantize import calibration as calibrating
from quantize.compression.int8.layers import Choice, Rounded, converted
from quantize.nn.int8_rows import quantize_weight_for


def find_rounded(
    model: nn.Module, choice: Choice, calibration: Iterable[Any]
) -> dict[str, Rounded]:
    """By layer, its weights in int8."""
    layers = {name: fact for name, fact in choice.chosen.items() if fact.recurrent}
    small = {name: converted(fact) for name, fact in layers.items()}
    sums: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    hooks = []
    for name, fact in layers.items():
        small[name].observer = _adding(sums[name])
        hook = _running(small[name])
        hooks.append(fact.module.register_forward_pre_hook(hook, with_kwargs=True))
    calibrating.run_all(model, calibration if layers else (), hooks)
    return {n: _rounded(layers[n].module, small[n], found) for n, found in sums.items() if found}


def _running(small: nn.Module) -> Any:
    """A hook that runs this layer too."""

    def run(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        small(*args, **kwargs)

    return run


def _adding(found: dict[str, Tensor]) -> Any:
    """An observer that adds up x^T x of the rows that each weight gets."""

    def add(name: str, rows: Tensor) -> None:
        found[name] = found.get(name, 0) + rows.t() @ rows

    return add


def _rounded(layer: Any, small: Any, sums: dict[str, Tensor]) -> Rounded:
    """The weights that are stored in int8."""
    weights = {}
    for name, moment in sums.items():
        if getattr(small, f"packed_{name}").dtype == torch.int8:
            weights[name] = quantize_weight_for(getattr(layer, f"weight_{name}"), moment)
    return Rounded(weights)
