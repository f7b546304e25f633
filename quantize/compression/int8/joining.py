"""What joins an int8 convolution: the BatchNorm, the ReLU or ReLU6 that alone read its output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from quantize import calibration as calibrating
from quantize import surgery
from quantize.compression.int8.layers import Choice
from quantize.nn.int8_conv import Int8Conv


def following(
    model: nn.Module, choice: Choice, calibration: Iterable[Any] | None
) -> dict[str, str]:
    """By name of a chosen convolution, or of a norm: the module that alone reads its output."""
    if not any(fact.convolution for fact in choice.chosen.values()):
        return {}
    kinds = nn.modules.batchnorm._BatchNorm
    layers = {name: fact.module for name, fact in choice.chosen.items() if fact.convolution}
    layers |= {name: norm for name, norm in model.named_modules() if isinstance(norm, kinds)}
    if calibration is None:
        return surgery.traced_followers(model, layers)
    return calibrating.followers(model, calibration, layers)


def fuse_activations(
    model: nn.Module, readers: Mapping[str, str], folded: Mapping[str, str]
) -> dict[str, str]:
    """Let int8 convolutions do the work of the activation that alone reads their output, in place:
    nn.ReLU or nn.ReLU6.

    Args:
        readers: as `following` gives them.
        folded: by norm, the convolution that it was folded into.

    Returns:
        The convolution that does the work of each activation, by its name.
    """
    found: dict[str, str] = {}
    asked = surgery.asked_classes(model)
    for last, name in readers.items():
        conv_name = folded.get(last, last)
        conv: Any = model.get_submodule(conv_name)
        activation = model.get_submodule(name)
        joined = isinstance(conv, Int8Conv) and surgery.is_plain(conv, [Int8Conv])
        watched = last in folded and not surgery.is_plain(model.get_submodule(last), [nn.Identity])
        stays = watched or activation in asked
        if joined and not stays and surgery.is_plain(activation, [nn.ReLU, nn.ReLU6]):
            conv.relu, conv.ceiling = True, 6.0 if isinstance(activation, nn.ReLU6) else None
            surgery.amend(conv, "Int8Conv", relu=True, ceiling=conv.ceiling)
            found[name] = conv_name
    surgery.absorb(model, found)
    return found
