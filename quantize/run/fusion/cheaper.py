"""The same values by cheaper operators: RMSNorm by a norm kernel, layers on one pixel as linear
layers.

`aten.rms_norm` is five operators that each go through memory (286 us for 128 rows of 512 on 2
threads of a Zen 4); the reduction that `vector_norm` has is vectorised. A 1 x 1 convolution on one
pixel, as in squeeze-and-excitation, costs 30 us before it computes anything, `aten.linear` 4 us.

Left out: keeping tables of rotary angles. For a fixed length they are constants and folded as such;
for a free length they are computed once per call for all layers, one cosine and one sine among
hundreds of operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from quantize.run.fusion.edit import (
    add_constant,
    argument,
    calls,
    constant,
    is_call,
    operators,
    own_constant,
    replace,
    shape,
)
from quantize.run.fusion.graph import Program, aten
from quantize.run.fusion.padding import numbers

_UNARY = operators(
    "relu silu gelu sigmoid tanh relu6 hardswish hardsigmoid hardtanh clamp leaky_relu"
)


def rms_norms(program: Program) -> None:
    """`rms_norm`, and the mean of squares that others spell out, by the Euclidean norm of each row;
    scales stay operators.
    """
    whole = [_one_reduction(program, node) for node in calls(program, {aten.rms_norm.default})]
    spelt = [_mean_of_squares(program, node) for node in calls(program, {aten.mean.dim})]
    program.note(sum(whole + spelt), "RMS norms by one reduction each")


def _one_reduction(program: Program, node: fx.Node) -> bool:
    """x / sqrt(mean of squares + epsilon), by the norm of each row. False if it can't be."""
    x, sizes, weight = argument(node, 0), argument(node, 1), argument(node, 2)
    scaled = weight is not None
    if not _is_rows(x) or len(sizes) != 1 or (scaled and not _is_float(program, weight)):
        return False
    epsilon = argument(node, 3)
    epsilon = torch.finfo(torch.float32).eps if epsilon is None else epsilon
    one, value = torch.full((1,), epsilon, dtype=torch.float32), x.meta["val"]
    share = 1.0 / int(value.shape[-1])
    with program.before(node):
        norm = _norm(program, x)
        row = norm.meta["val"]
        shift = add_constant(program, norm, "rms_norm_epsilon", one)
        mean = program.call(aten.addcmul.default, shift, norm, norm, value=share, val=row)
        factor = program.call(aten.rsqrt.default, mean, val=row)
        y = program.call(aten.mul.Tensor, x, factor, val=value)
        y = program.call(aten.mul.Tensor, y, weight, val=value) if scaled else y
    replace(node, y)
    return True


def _mean_of_squares(program: Program, node: fx.Node) -> bool:
    """The mean of x^2 over each row, by its norm. False if `node` is another mean."""
    square = argument(node, 0)
    if not is_call(square, aten.pow.Tensor_Scalar) or argument(square, 1) != 2:
        return False
    x, by_row = argument(square, 0), list(argument(node, 1)) == [-1] and argument(node, 2)
    if not _is_rows(x) or not by_row or node.kwargs or len(square.users) != 1:
        return False
    with program.before(node):
        norm = _norm(program, x)
        row = norm.meta["val"]
        total = program.call(aten.mul.Tensor, norm, norm, val=row)
        mean = program.call(aten.mul.Tensor, total, 1.0 / int(x.meta["val"].shape[-1]), val=row)
    replace(node, mean)
    return True


def _is_float(program: Program, node: fx.Node) -> bool:
    tensor = constant(program, node)
    tensor = node.meta.get("val") if tensor is None else tensor
    return isinstance(tensor, Tensor) and tensor.dtype == torch.float32


def _is_rows(node: Any) -> bool:
    """Float32 on the CPU, with rows of a length that doesn't vary?"""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return False
    if value.device.type != "cpu" or not value.dim():
        return False
    # a size that the export found out to be fixed is still a symbol's name for its number
    return shape(node)[-1].isdigit()


def _norm(program: Program, x: fx.Node) -> fx.Node:
    """Euclidean norm over the last axis, kept as an axis of one."""
    value = x.meta["val"]
    one = value.new_empty((*value.shape[:-1], 1))
    return program.call(aten.linalg_vector_norm.default, x, 2, [-1], True, val=one)


def one_pixel_convolutions(program: Program) -> None:
    """A convolution of a 1 x 1 image by a 1 x 1 kernel (squeeze and excitation) is a linear
    layer.
    """
    count = 0
    for node in calls(program, {aten.conv2d.default}):
        x, bias = argument(node, 0), argument(node, 2)
        weight = argument(node, 1)
        prepared = weight.meta.get("prepare")
        known = weight.meta["val"] if prepared else own_constant(program, weight)
        if known is None or known.shape[2:] != (1, 1):
            continue
        one_pixel = shape(x)[2:] == ["1", "1"] and len(shape(x)) == 4
        plain = numbers(argument(node, 4, 0), 2) == [0, 0] and argument(node, 6, 1) == 1
        if not one_pixel or not plain or (bias is not None and constant(program, bias) is None):
            continue
        rows, results = (v.new_empty(v.shape[:2]) for v in (x.meta["val"], node.meta["val"]))
        outputs, inputs = known.shape[:2]
        with program.before(node):
            if prepared:
                flat = known.new_empty(outputs, inputs)
                matrix = program.call(aten.reshape.default, weight, [outputs, inputs], val=flat)
                matrix.meta["prepare"] = True
            else:
                matrix = add_constant(program, node, f"{weight.target}_matrix", known.flatten(1))
            operands = [matrix] if bias is None else [matrix, bias]
            flat = program.call(aten.reshape.default, x, [-1, inputs], val=rows)
            y = program.call(aten.linear.default, flat, *operands, val=results)
            back = program.call(aten.reshape.default, y, [-1, outputs, 1, 1])
        replace(node, back)
        _after(program, back)
        if is_call(x, aten.reshape.default) and shape(argument(x, 0)) == shape(flat):
            flat.replace_all_uses_with(argument(x, 0))
        count += 1
    program.note(count, "convolutions of one pixel as linear layers")


def _after(program: Program, back: fx.Node) -> None:
    """Activations of the reshaped result move in front of the reshape, where the linear layer can
    take them in.
    """
    user = next(iter(back.users))
    while len(back.users) == 1 and user.target in _UNARY:
        inner = argument(back, 0)
        with program.before(back):
            how = {**user.kwargs, "val": inner.meta["val"]}
            activated = program.call(user.target, inner, *user.args[1:], **how)
        back.args = (activated, *back.args[1:])
        replace(user, back)
        user = next(iter(back.users))
