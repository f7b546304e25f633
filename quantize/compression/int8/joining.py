"""What joins an int8 layer: the BatchNorm that alone reads a convolution's output, and the
activation that alone reads a layer's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from quantize import calibration as calibrating
from quantize import surgery
from quantize.compression.int8.layers import Choice
from quantize.nn.activations import activation_of
from quantize.nn.int8 import Int8Linear
from quantize.nn.int8_conv import Int8Conv
from quantize.nn.int8_outliers import Int8OutlierLinear

_NORMS = nn.modules.batchnorm._BatchNorm
_CEILINGS = {nn.ReLU: None, nn.ReLU6: 6.0}  # of what convolutions do the work of
Joining = tuple[Mapping[str, str], Mapping[str, str]]  # readers, and convolutions by folded norm
_ACTIVE = (Int8Linear, Int8OutlierLinear, Int8Conv)  # those with an activation of their own


def following(
    model: nn.Module, choice: Choice, calibration: Iterable[Any] | None
) -> dict[str, str]:
    """By name of a chosen layer, or of a norm: the module that alone reads its output."""
    linears = {name: fact.module for name, fact in choice.chosen.items() if fact.linear}
    found = surgery.traced_followers(model, linears, _is_activation)
    layers = {name: fact.module for name, fact in choice.chosen.items() if fact.convolution}
    if layers:
        layers |= {name: norm for name, norm in model.named_modules() if isinstance(norm, _NORMS)}
    if calibration is None:
        return found | surgery.traced_followers(model, layers, _joins_convolutions)
    left = {name: layer for name, layer in linears.items() if name not in found}
    layers |= {name: layer for name, layer in left.items() if _has_activation(model, name)}
    return found | (calibrating.followers(model, calibration, layers) if layers else {})


def _is_activation(module: nn.Module) -> bool:
    return activation_of(module) is not None


def _joins_convolutions(module: nn.Module) -> bool:
    return isinstance(module, (_NORMS, *_CEILINGS)) or _is_activation(module)


def _has_activation(model: nn.Module, name: str) -> bool:
    """Does an activation stand beside this layer?"""
    owner = model.get_submodule(name.rpartition(".")[0])
    return any(map(_is_activation, owner.children()))


def fuse_activations(
    model: nn.Module, readers: Mapping[str, str], folded: Mapping[str, str]
) -> dict[str, str]:
    """Let int8 layers do the work of the activation that alone reads their output, in place: of
    those in `elementary.ACTIVATIONS`, convolutions of nn.ReLU6 too.

    Args:
        readers: as `following` gives them.
        folded: by norm, the convolution that it was folded into.

    Returns:
        The layer that does the work of each activation, by its name.
    """
    found: dict[str, str] = {}
    asked = surgery.asked_classes(model)
    for last, name in readers.items():
        layer_name = folded.get(last, last)
        watched = last in folded and not surgery.is_plain(model.get_submodule(last), [nn.Identity])
        reader = model.get_submodule(name)
        if not watched and reader not in asked and _joins(model.get_submodule(layer_name), reader):
            found[name] = layer_name
    surgery.absorb(model, found)
    return found


def _joins(layer: Any, reader: nn.Module) -> bool:
    """Let a layer do the work of a module that reads it, if it can; says whether it does."""
    if surgery.is_plain(layer, [Int8Conv]) and surgery.is_plain(reader, _CEILINGS):
        layer.relu, layer.ceiling = True, _CEILINGS[type(reader)]
        surgery.amend(layer, "Int8Conv", relu=True, ceiling=layer.ceiling)
        return True
    activation = activation_of(reader)
    if activation is not None and surgery.is_plain(layer, _ACTIVE):
        layer.activate(activation)
        return True
    return False
