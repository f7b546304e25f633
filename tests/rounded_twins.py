"""What int8 models must compute, bit for bit: the arithmetic that the headers of `int8_kernels` and
`int8_images` define, written once more with exact sums in float64.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantize.native.conv import LAST, channels_last
from quantize.nn.elementary import ACTIVATIONS
from quantize.nn.int8 import Int8Linear
from quantize.nn.int8_conv import Int8Conv

CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the dimensions of the input


def in_steps(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[M, K]` of float32 in whole steps from 0, and the step of each, `[M, 1]`: 255 steps
    over a row's range, which holds 0.
    """
    low, high = rows.amin(1, keepdim=True).clamp_max(0), rows.amax(1, keepdim=True).clamp_min(0)
    step = (high * (1 / 255) - low * (1 / 255)).clamp_min(1e-30)
    zero = (-low * step.reciprocal()).round()
    q = (rows * step.reciprocal()).round() + zero
    return q.clamp(0, 255) - zero, step


def linear(layer: Int8Linear, x: Tensor) -> Tensor:
    """What the layer must answer."""
    steps, step = in_steps(x.detach().float().reshape(-1, layer.in_features))
    total = (steps.double() @ layer.packed.double().t()).float()
    y = total * layer.scale * step
    y = y if layer.bias is None else y + layer.bias.float()
    if layer.activation is not None:
        y = ACTIVATIONS[layer.activation](y)
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def looks_at_one_pixel(layer: Int8Conv) -> bool:
    """Whether each output pixel looks at one input pixel, in order: each has steps of its own."""
    still = {*layer.kernel_size, *layer.stride, layer.groups} == {1}
    return still and not any(layer.geometry.before + layer.geometry.after)


def depthwise(layer: Int8Conv, x: Tensor) -> Tensor:
    """What a layer of one channel for each output must give, without its bias: float32 products,
    added place after place.
    """
    weight = layer.packed.float() * layer.scale.reshape(-1, *[1] * (x.dim() - 1))
    one_place = torch.zeros(weight[0].numel(), *weight[0].shape)
    one_place.flatten(1).fill_diagonal_(1)
    placed: Any = layer.stride, layer.padding, layer.dilation, layer.groups
    shape = -1, *[1] * (x.dim() - 2)
    total = torch.zeros(())
    for place, own in zip(one_place, weight.flatten(1).unbind(1), strict=True):
        seen = CONVOLUTIONS[x.dim()](x, place.expand_as(weight), None, *placed)
        total = total + seen * own.reshape(shape)
    return total


def convolution(layer: Int8Conv, x: Tensor) -> Tensor:
    """What the layer must answer to a batch `[N, C, *size]`; its padding is zeros."""
    values, spatial = x.detach().float(), [1] * (x.dim() - 2)
    if 1 < layer.groups == layer.in_channels == layer.out_channels:
        y = depthwise(layer, values)
    else:
        y = products(layer, values)
    if layer.bias is not None:
        y = y + layer.bias.float().reshape(-1, *spatial)
    if layer.activation is not None:
        y = ACTIVATIONS[layer.activation](y)
    if layer.relu:
        y = y.relu()
    y = (y if layer.ceiling is None else y.clamp(max=layer.ceiling)).to(x.dtype)
    return y.contiguous(memory_format=LAST[x.dim()]) if channels_last(x) else y


def products(layer: Int8Conv, x: Tensor) -> Tensor:
    """What the layer must give, without its bias."""
    spatial = [1] * (x.dim() - 2)
    if looks_at_one_pixel(layer):
        pixels = x.movedim(1, -1)
        steps, step = in_steps(pixels.reshape(-1, x.shape[1]))
        steps = steps.reshape(pixels.shape).movedim(-1, 1)
        step = step.reshape(*pixels.shape[:-1], 1).movedim(-1, 1)
    else:
        steps, step = in_steps(x.flatten(1))
        steps, step = steps.reshape(x.shape), step.reshape(-1, 1, *spatial)
    placed: Any = layer.stride, layer.padding, layer.dilation, layer.groups
    total = CONVOLUTIONS[x.dim()](steps.double(), layer.packed.double(), None, *placed).float()
    return total * layer.scale.reshape(-1, *spatial) * step


ORACLES = {Int8Linear: linear, Int8Conv: convolution}


def rounded_twin(model: nn.Module) -> nn.Module:
    """A copy of an int8 model whose linear layers and convolutions answer by definition."""
    twin = copy.deepcopy(model)
    for layer in twin.modules():
        if oracle := ORACLES.get(type(layer)):
            layer.forward = partial(oracle, layer)
    return twin
