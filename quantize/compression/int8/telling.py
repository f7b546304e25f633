"""What is said of a model in int8: what became of each layer, and what stays in float and why."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quantize import surgery
from quantize.compression.int8.layers import INT8, Choice, Plans, Report, Stored
from quantize.nn.int8_outliers import Int8OutlierLinear

_MUCH = 0.4  # share of the bytes, from which on a warning says that they stay float


@dataclass
class Made:
    """A model in int8.

    Args:
        model: with int8 layers.
        choice: which ones.
        distance: its relative error on calibration, if there is any.
        joined: names of activations, with the layer that does the work of each.
        settings: to be noted.
    """

    model: nn.Module
    choice: Choice
    joined: dict[str, str]
    distance: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def tell(made: Made, plans: Plans, left: Report, folded: Mapping[str, str]) -> None:
    """Note on the model what became of its layers."""
    told, total = _with_shares(made.model, made.choice.left | left)
    layers = {n: m for n, m in made.model.named_modules() if isinstance(m, INT8)}
    done = {name: _became(name, layer, plans) for name, layer in layers.items()}
    done |= {gone: f"folded into {layer}" for gone, layer in folded.items()}
    if total:
        made.settings["stays_float"] = total
    surgery.note(made.model, "int8", done=done, left=told, distance=made.distance, **made.settings)


def nothing(model: nn.Module, left: Report) -> str:
    """Why no layer is left to quantize."""
    already = any(isinstance(m, INT8) for m in model.modules())
    floating = sum(surgery.stays_float(model).values())
    bytes_left = f"{floating} of its {_bytes(model)} bytes stay float"
    why = "it is already quantized" if already else bytes_left
    detail = surgery.shortened(left) or "it has no layer of a kind that becomes int8"
    return f"{type(model).__name__} has no layer left to quantize: {why} ({detail})"


def unconverted(model: nn.Module, left: Report, why: str) -> nn.Module:
    """A float copy that says why it is one."""
    new = surgery.clone(model)
    warnings.warn(
        f"{why}, so the result is a float copy; prefer='size' converts all "
        f"({surgery.shortened(left)})",
        stacklevel=3,
    )
    surgery.note(new, "int8", left=left)
    return new


def warn_of_stored(why: str) -> None:
    """A UserWarning that the result is smaller, but no faster."""
    warnings.warn(
        f"{why}, so tables and convolutions are stored in int8, convolutions compute in float, and "
        "all else is as it was; prefer='size' converts all",
        stacklevel=3,
    )


def _became(name: str, layer: nn.Module, plans: Plans) -> str:
    """What became of a layer, in words."""
    plan = plans.get(name)
    if isinstance(plan, Stored):
        return f"stored in int8, computes in float: {plan.reason}"
    if not isinstance(layer, Int8OutlierLinear):
        return "int8"
    count = len(layer.channels)
    if not count:
        return "int8, inputs evened out"
    return f"int8, {count} outlier channel{'s' if count > 1 else ''} in float"


def _with_shares(model: nn.Module, report: Report) -> tuple[Report, str | None]:
    """The reasons with the part of the model's bytes that each layer has, and in words how much of
    it stays float.
    """
    whole = _bytes(model)
    sizes = surgery.stays_float(model)
    shares = {name: sizes.get(name, 0) / whole for name in report} if whole else {}
    told = {
        n: f"{why} ({shares[n]:.0%} of the bytes)" if shares.get(n, 0) >= 0.01 else why
        for n, why in report.items()
    }
    total = sum(sizes.values())
    if not whole or total < 0.01 * whole:
        return told, None
    words = f"{total / whole:.0%} of {whole} bytes"
    if total > _MUCH * whole:
        most = [name for name in sizes if name in report][:4]
        reasons = "; ".join(f"{name or '(the model)'}: {told[name]}" for name in most)
        warnings.warn(f"int8: {words} stay in floating point ({reasons})", stacklevel=4)
    return told, words


def _bytes(model: nn.Module) -> int:
    return sum(
        tensor.nbytes
        for tensor in model.state_dict().values()
        if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
    )
