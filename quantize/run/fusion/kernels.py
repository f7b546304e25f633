"""Convolution or linear + activation (+ residual) as one oneDNN kernel on a weight packed
beforehand; CPU, float32.

The operators are stock PyTorch's (`mkldnn._convolution_pointwise`, `mkldnn._linear_pointwise`: what
`torch.compile` freezes to). Whether this build has them, and which activations they know, is found
out by trying them on a few numbers. A packed weight makes a convolution answer in channels-last, so
the layout needs no conversion operators.

Int8 linear layers keep their own operators: they multiply by one scale per row after the integer
product, so that an activation can't be part of the kernel that makes it. Int8 convolutions are in
integers.py.

One difference remains: these kernels' ReLU is max(x, 0), which makes a NaN a 0, where eager keeps
the NaN.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, fx

from quantize.run.fusion.edit import (
    LINEARS,
    argument,
    calls,
    constant,
    drop_dead,
    loosen_views,
    replace,
    shape,
    weight_of,
)
from quantize.run.fusion.graph import Program, aten
from quantize.run.fusion.padding import numbers

# Linear layers with fewer multiplications stay as they are: a packed kernel takes 16 us before it
# starts, `aten.linear` 4.
SMALL = 1 << 19

# How to get the plain weight back from the packed one, for files.
_UNPACK = "{}.to_dense()"

_CONVOLUTION = torch.ops.mkldnn._convolution_pointwise
_LINEAR = torch.ops.mkldnn._linear_pointwise

Activation = tuple[str, tuple[float, ...], str]  # name, scalars and algorithm in oneDNN's words
NONE: Activation = ("none", (), "")
_OPERATORS = {  # by oneDNN's names
    "none": aten.clone,
    "relu": aten.relu,
    "sigmoid": aten.sigmoid,
    "tanh": aten.tanh,
    "swish": aten.silu,
    "hardswish": aten.hardswish,
    "hardsigmoid": aten.hardsigmoid,
    "hardtanh": aten.clamp,
    "leaky_relu": aten.leaky_relu,
    "gelu": aten.gelu,
}
_NAMES = {operator.default: name for name, operator in _OPERATORS.items()}


@functools.cache
def known(activation: str, scalars: tuple[float, ...] = (), algorithm: str = "") -> bool:
    """Does this build's convolution kernel know this activation, with the right numbers?"""
    words = {"approximate": algorithm} if algorithm else {}
    own = (None, activation, [*scalars], algorithm)
    try:
        with torch.no_grad():
            x = torch.linspace(-8, 8, 64).reshape(1, 1, 8, 8)
            weight, zero, one = torch.ones(1, 1, 1, 1), [0, 0], [1, 1]
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight, zero, one, one, 1, None)
            conv = _CONVOLUTION(x, packed, None, zero, one, one, 1, *own[1:])
            matrix = torch.ops.mkldnn._reorder_linear_weight(torch.ones(1, 1))
            line = _LINEAR(x.reshape(64, 1), matrix, *own).reshape(x.shape)
            expected = _OPERATORS[activation](x, *scalars, **words)
            return all(torch.allclose(y, expected, atol=1e-5) for y in (conv, line))
    except (RuntimeError, AttributeError):
        return False


def available() -> bool:
    """Are the packed kernels there?"""
    return torch.backends.mkldnn.is_available() and known("none")


def activation_of(node: fx.Node) -> Activation | None:
    """An activation operator in oneDNN's words."""
    found: Activation | None = None
    target: Any = node.target
    if target is aten.relu6.default:
        found = ("hardtanh", (0.0, 6.0), "")
    elif target in (aten.hardtanh.default, aten.clamp.default):
        most = 1.0 if target is aten.hardtanh.default else None
        limits = argument(node, 1, -1.0), argument(node, 2, most)
        if all(isinstance(limit, (int, float)) for limit in limits):
            found = ("hardtanh", (float(limits[0]), float(limits[1])), "")
    elif target is aten.leaky_relu.default:
        found = ("leaky_relu", (float(argument(node, 1, 0.01)),), "")
    elif target is aten.gelu.default:
        algorithm = node.kwargs.get("approximate", argument(node, 1, "none"))
        found = ("gelu", (), str(algorithm))
    elif target in _NAMES and target is not aten.clone.default:
        found = (_NAMES[target], (), "")
    return found if found and known(*found) else None


def use_kernels(program: Program) -> None:
    """Replace convolutions and linears by packed kernels, with the activation and the residual add
    that follow.
    """
    alone = activated = added = 0
    for node in calls(program, {aten.conv2d.default, *LINEARS}):
        prepared = _packed(program, node)
        if prepared is None:
            continue
        last, other, activation = node, _residual(node), NONE
        if other is not None:
            (last,) = node.users
        user = sole_user(last)
        found = None if user is None else activation_of(user)
        if user is not None and found is not None:
            # after a sum, the kernels of convolutions alone know one
            if other is None or (found[0] == "relu" and node.target not in LINEARS):
                last, activation = user, found
        replace(last, _kernel(program, node, last, prepared, other, activation))
        alone += other is None and activation is NONE
        activated += activation is not NONE
        added += other is not None
    drop_dead(program)
    if alone or activated or added:
        loosen_views(program)
        program.notes.append(
            f"{activated} activations and {added} residual adds fused into packed kernels; "
            f"{alone} packed kernels without"
        )


def _residual(node: fx.Node) -> fx.Node | None:
    """What is added to the result of a layer, where nothing else reads it."""
    user = sole_user(node)
    if user is None or user.target is not aten.add.Tensor or user.kwargs or len(user.args) != 2:
        return None
    other = argument(user, 1) if argument(user, 0) is node else argument(user, 0)
    fits = other is not node and isinstance(other, fx.Node) and _like(other, node)
    return other if fits else None


def sole_user(node: fx.Node) -> fx.Node | None:
    """The operator that reads this one's result, if it is one."""
    user = next(iter(node.users), None)
    if user is None or len(node.users) > 1 or user.op != "call_function" or not user.args:
        return None
    return user


def _like(a: fx.Node, b: fx.Node) -> bool:
    """Same shape and dtype, so that adding needs no broadcasting."""
    x, y = a.meta.get("val"), b.meta.get("val")
    same = isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype
    return same and shape(a) == shape(b) and a.op != "get_attr"


def _packed(program: Program, node: fx.Node) -> fx.Node | None:
    """A node that packs the weight of `node` when the model is loaded; None if the kernels can't
    run this layer.
    """
    x, bias = argument(node, 0).meta.get("val"), argument(node, 2)
    weight: Any = weight_of(program, node)
    if weight is None or weight.device.type != "cpu" or not weight.numel():
        return None
    if bias is not None and getattr(constant(program, bias), "dtype", None) != weight.dtype:
        return None
    linear = node.target in LINEARS
    bf16 = linear and weight.dtype == torch.bfloat16
    usable = torch.ops.mkldnn._is_mkldnn_bf16_supported() if bf16 else weight.dtype == torch.float32
    if not usable or not isinstance(x, Tensor) or x.dtype != weight.dtype:
        return None
    sizes = [*map(hint, x.shape)]
    if linear:
        rows = max(1, math.prod(sizes[:-1]) // program.widened)
        if len(sizes) < 2 or rows * weight.numel() < SMALL:
            return None
        how = (torch.ops.mkldnn._reorder_linear_weight.default, argument(node, 1), rows)
    else:
        moves = [numbers(argument(node, i, d), 2) for i, d in ((4, 0), (3, 1), (5, 1))]
        if len(sizes) != 4 or None in moves:
            return None
        sizes[0] = max(1, sizes[0] // program.widened)
        pack = torch.ops.mkldnn._reorder_convolution_weight.default
        how = (pack, argument(node, 1), *moves, argument(node, 6, 1), sizes)
    with program.before(node):
        prepared = program.call(*how)
    prepared.meta["prepare"] = _UNPACK
    return prepared


def hint(size: int | torch.SymInt) -> int:
    """A size as it was in the example."""
    return size if isinstance(size, int) else int(size.node.hint or 1)


def _kernel(
    program: Program,
    node: fx.Node,
    last: fx.Node,
    prepared: fx.Node,
    other: fx.Node | None,
    activation: Activation,
) -> fx.Node:
    x, bias = argument(node, 0), argument(node, 2)
    name, scalars, algorithm = activation
    ending = (name, [*scalars], algorithm)
    with program.before(last):
        if node.target in LINEARS:
            if other is None:
                return program.call(_LINEAR.default, x, prepared, bias, *ending)
            return program.call(_LINEAR.binary, x, other, prepared, bias, "add")
        _, padding, stride, dilation, groups, _ = prepared.args
        how = (prepared, bias, padding, stride, dilation, groups)
        if other is None:
            return program.call(_CONVOLUTION.default, x, *how, *ending)
        unary = (None, [], None) if activation is NONE else ending
        return program.call(_CONVOLUTION.binary, x, other, *how, "add", 1.0, *unary)
