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
)
from quantize.run.fusion.graph import Program, aten

# Linear layers with fewer multiplications stay as they are: a packed kernel takes 16 us before it
# starts, `aten.linear` 4.
SMALL = 1 << 19

# How to get the plain weight back from the packed one, for files.
_UNPACK = "{}.to_dense()"


@functools.cache
def known(activation: str, scalars: tuple[float, ...] = (), algorithm: str = "") -> bool:
    """Does this build's convolution kernel know this activation, with the right numbers?"""
    reference = {
        "none": lambda x: x,
        "relu": torch.relu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "swish": torch.nn.functional.silu,
        "hardswish": torch.nn.functional.hardswish,
        "hardsigmoid": torch.nn.functional.hardsigmoid,
        "hardtanh": lambda x: torch.clamp(x, *scalars),
        "leaky_relu": lambda x: torch.nn.functional.leaky_relu(x, scalars[0]),
        "gelu": lambda x: torch.nn.functional.gelu(x, approximate=algorithm),
    }[activation]
    try:
        with torch.no_grad():
            x = torch.linspace(-8, 8, 64).reshape(1, 1, 8, 8)
            weight, one = torch.ones(1, 1, 1, 1), [1, 1]
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight, [0, 0], one, one, 1, None)
            conv = torch.ops.mkldnn._convolution_pointwise(
                x, packed, None, [0, 0], one, one, 1, activation, list(scalars), algorithm
            )
            line = torch.ops.mkldnn._linear_pointwise(
                x.reshape(64, 1),
                torch.ops.mkldnn._reorder_linear_weight(torch.ones(1, 1)),
                None,
                activation,
                list(scalars),
                algorithm,
            )
            expected = reference(x)
            return torch.allclose(conv, expected, atol=1e-5) and torch.allclose(
                line.reshape(expected.shape), expected, atol=1e-5
            )
    except (RuntimeError, AttributeError):
        return False


def available() -> bool:
    """Are the packed kernels there?"""
    return torch.backends.mkldnn.is_available() and known("none")


def activation_of(node: fx.Node) -> tuple[str, tuple[float, ...], str] | None:
    """Name, scalars and algorithm of an activation operator in oneDNN's words."""
    simple = {
        aten.relu.default: "relu",
        aten.sigmoid.default: "sigmoid",
        aten.tanh.default: "tanh",
        aten.silu.default: "swish",
        aten.hardswish.default: "hardswish",
        aten.hardsigmoid.default: "hardsigmoid",
    }
    found: tuple[str, tuple[float, ...], str] | None = None
    target: Any = node.target
    if target in simple:
        found = (simple[target], (), "")
    elif node.target is aten.relu6.default:
        found = ("hardtanh", (0.0, 6.0), "")
    elif node.target in (aten.hardtanh.default, aten.clamp.default):
        low, high = (
            argument(node, 1, -1.0),
            argument(node, 2, 1.0 if node.target is aten.hardtanh.default else None),
        )
        if isinstance(low, (int, float)) and isinstance(high, (int, float)):
            found = ("hardtanh", (float(low), float(high)), "")
    elif node.target is aten.leaky_relu.default:
        found = ("leaky_relu", (float(argument(node, 1, 0.01)),), "")
    elif node.target is aten.gelu.default:
        algorithm = node.kwargs.get("approximate", argument(node, 1, "none"))
        found = ("gelu", (), str(algorithm))
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
        last, other, act = node, None, ("none", (), "")
        user = sole_user(last)
        if (
            user is not None
            and user.target is aten.add.Tensor
            and not user.kwargs
            and len(user.args) == 2
        ):
            candidate = argument(user, 1) if argument(user, 0) is last else argument(user, 0)
            if candidate is not last and isinstance(candidate, fx.Node) and _like(candidate, last):
                last, other = user, candidate
        user = sole_user(last)
        if user is not None:
            found = activation_of(user)
            if found is not None and (
                other is None or (found[0] == "relu" and node.target not in LINEARS)
            ):
                last, act = user, found
        new = _kernel(program, node, last, prepared, other, act)
        replace(last, new)
        alone += other is None and act[0] == "none"
        activated += act[0] != "none"
        added += other is not None
    drop_dead(program)
    if alone or activated or added:
        loosen_views(program)
        program.notes.append(
            f"{activated} activations and {added} residual adds fused into packed kernels; "
            f"{alone} packed kernels without"
        )


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
    x, weight, bias = (
        argument(node, 0).meta.get("val"),
        constant(program, argument(node, 1)),
        argument(node, 2),
    )
    if (
        weight is None
        or weight.device.type != "cpu"
        or weight.numel() == 0
        or not isinstance(x, Tensor)
    ):
        return None
    if bias is not None and getattr(constant(program, bias), "dtype", None) != weight.dtype:
        return None
    bf16 = (
        weight.dtype == torch.bfloat16
        and node.target in LINEARS
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    if x.dtype != weight.dtype or not (weight.dtype == torch.float32 or bf16):
        return None
    if node.target in LINEARS:
        if x.dim() < 2:
            return None
        rows = 1
        for size in x.shape[:-1]:
            rows *= hint(size)
        rows = max(1, rows // program.widened)
        if rows * weight.numel() < SMALL:
            return None
        target, arguments = (
            torch.ops.mkldnn._reorder_linear_weight.default,
            (argument(node, 1), rows),
        )
    else:
        if x.dim() != 4:
            return None
        stride, padding, dilation = (
            _pair(argument(node, i, d)) for i, d in ((3, 1), (4, 0), (5, 1))
        )
        if None in (stride, padding, dilation):
            return None
        size = [max(1, hint(x.shape[0]) // program.widened), *(hint(s) for s in x.shape[1:])]
        target = torch.ops.mkldnn._reorder_convolution_weight.default
        arguments = (argument(node, 1), padding, stride, dilation, argument(node, 6, 1), size)
    with program.graph.inserting_before(node):
        prepared = program.graph.call_function(target, arguments)
    prepared.meta["prepare"] = _UNPACK
    return prepared


def hint(size: int | torch.SymInt) -> int:
    """A size as it was in the example."""
    return size if isinstance(size, int) else int(size.node.hint or 1)


def _pair(value: object) -> list[int] | None:
    if isinstance(value, int):
        return [value, value]
    if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
        return [*value] * 2 if len(value) == 1 else [*value]
    return None


def _kernel(
    program: Program,
    node: fx.Node,
    last: fx.Node,
    prepared: fx.Node,
    other: fx.Node | None,
    act: tuple[str, tuple[float, ...], str],
) -> fx.Node:
    x, bias = argument(node, 0), argument(node, 2)
    name, scalars, algorithm = act
    with program.graph.inserting_before(last):
        if node.target in LINEARS:
            if other is None:
                return program.graph.call_function(
                    torch.ops.mkldnn._linear_pointwise.default,
                    (x, prepared, bias, name, [*scalars], algorithm),
                )
            return program.graph.call_function(
                torch.ops.mkldnn._linear_pointwise.binary, (x, other, prepared, bias, "add")
            )
        _, padding, stride, dilation, groups, _ = prepared.args
        where = (padding, stride, dilation, groups)
        if other is None:
            return program.graph.call_function(
                torch.ops.mkldnn._convolution_pointwise.default,
                (x, prepared, bias, *where, name, [*scalars], algorithm),
            )
        unary = (None, [], None) if name == "none" else (name, [*scalars], algorithm)
        return program.graph.call_function(
            torch.ops.mkldnn._convolution_pointwise.binary,
            (x, other, prepared, bias, *where, "add", 1.0, *unary),
        )
