"""How the forward of a module of int8 convolutions is read: modules inside are nodes, and stand-ins
for tensors know as many of their sizes as are given.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from quantize.native.conv import Ending, Geometry
from quantize.nn.int8 import Int8Linear
from quantize.nn.int8_conv import Int8Conv

POOLINGS = (nn.MaxPool2d, nn.AdaptiveAvgPool2d)
_BETWEEN = (nn.Identity, nn.Dropout, nn.ReLU, nn.ReLU6, nn.ZeroPad2d)
LEAVES = (Int8Conv, Int8Linear, *_BETWEEN, *POOLINGS)
RELU, RELU6 = Ending(0.0), Ending(0.0, 6.0)
ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
PRODUCTS = {operator.mul, torch.mul, "mul"}
MEANS = {torch.mean, "mean", F.adaptive_avg_pool2d}
FLATTENINGS = {torch.flatten, "flatten"}
ACTIVATIONS: dict[Any, Ending] = {
    **dict.fromkeys((torch.relu, torch.relu_, Tensor.relu, F.relu, "relu", "relu_"), RELU),
    F.relu6: RELU6,
}
Sizes = tuple[Any, ...]  # [samples, channels, *size] of a value; None for one that isn't known
Pads = tuple[tuple[int, ...], tuple[int, ...]]  # zeros before and after each dimension


class Unfit(Exception):
    """A forward that is no program."""


class AsksForSize(Unfit):
    """A forward that can be read for inputs of one shape only."""


def kernel_of(module: Any) -> tuple[int, ...]:
    """Of a convolution or a pooling."""
    own: tuple[int, ...] = module.kernel_size
    return own if isinstance(module, Int8Conv) else _pair(own)


def geometry_of(module: Any) -> Geometry:
    """Of a convolution or a pooling."""
    if isinstance(module, Int8Conv):
        return module.geometry
    pads = _pair(module.padding)
    return Geometry(_pair(module.stride), _pair(module.dilation), pads, pads)


def is_mean(module: Any) -> bool:
    """Does a pooling leave one pixel, the mean of all?"""
    return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


class Call(nn.Module):
    """A call with one argument: the forward inside has its defaults for all others."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Any) -> Any:
        return self.inside(x)


class Tracer(fx.Tracer):
    """Goes into all modules but LEAVES. sizes: of the input, which a forward may ask for."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.known: dict[fx.Node, Sizes] = {}  # of what nodes give

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LEAVES)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def sizes_of(self, node: fx.Node) -> Sizes:
        """Of what a node gives."""
        if node not in self.known:
            self.known[node] = self._sizes_of(node)
        return self.known[node]

    def _sizes_of(self, node: fx.Node) -> Sizes:
        if node.op == "placeholder":
            return self.sizes
        found = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        known = found is not None or node.target in ADDS | PRODUCTS | ACTIVATIONS.keys()
        first = node.args[0] if known or node.target is F.pad else None
        if not isinstance(first, fx.Node):
            raise Unfit("a forward that asks for a size of something else")
        samples, channels, *size = self.sizes_of(first)
        if isinstance(found, Int8Conv):
            channels = found.out_channels
        if isinstance(found, nn.AdaptiveAvgPool2d):
            return samples, channels, 1, 1
        if None in size:
            return samples, channels, *size
        if isinstance(found, (Int8Conv, nn.MaxPool2d)):
            size = list(geometry_of(found).sizes(size, kernel_of(found)))
        pads = pads_of(node, found, len(size)) or ()
        return samples, channels, *map(sum, zip(size, *pads, strict=True))


class _Value(fx.Proxy):
    """What stands for a tensor, whose sizes are known as far as the tracer's."""

    @property
    def shape(self) -> _Shape:
        tracer: Any = self.tracer
        return _Shape(tracer.sizes_of(self.node))

    def size(self, dimension: int | None = None) -> Any:
        return self.shape if dimension is None else self.shape[dimension]


@dataclass(frozen=True)
class _Shape:
    sizes: Sizes

    def __getitem__(self, dimension: int | slice) -> Any:
        found = self.sizes[dimension]
        if found is None or (isinstance(found, tuple) and None in found):
            raise AsksForSize("a forward that asks for a size")
        return found


def pads_of(node: fx.Node, module: nn.Module | None, dimensions: int) -> Pads | None:
    """The zeros that a node adds before and after each dimension; None for one that pads nothing.

    Raises: Unfit: for padding with other numbers, or of channels.
    """
    pads: Any = None
    if isinstance(module, nn.ZeroPad2d):
        pads = module.padding
    elif node.target is F.pad:
        given = dict(zip(("pad", "mode", "value"), node.args[1:], strict=False)) | node.kwargs
        pads = given["pad"]
        if given.get("mode", "constant") != "constant" or given.get("value"):
            raise Unfit("padding with other numbers than 0")
    if pads is None:
        return None
    if len(pads) > 2 * dimensions or any(type(n) is not int or n < 0 for n in pads):
        raise Unfit("padding of channels, or less than none")
    whole = [*pads, *[0] * (2 * dimensions - len(pads))]  # pairs, the last dimension first
    return tuple(whole[-2::-2]), tuple(whole[::-2])
