"""BatchNorm and scales folded into the weights of the layer beside them.

The arithmetic is in the pure functions at the end, in float64; the passes find where it is legal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from quantize.run.fusion.edit import (
    CONVS,
    LINEARS,
    TRANSPOSED,
    add_constant,
    argument,
    calls,
    constant,
    overload,
    own_constant,
    replace,
    set_arguments,
    shape,
)
from quantize.run.fusion.graph import Program, aten
from quantize.run.fusion.padding import numbers as as_numbers

_AFFINE = (aten.batch_norm.default, aten.mul.Tensor, aten.add.Tensor)


def fold_batch_norm(program: Program) -> None:
    """BatchNorm, and factors and summands of one number per channel, which frozen norms are, into
    the convolution, transposed convolution or linear layer before it, or else after it.
    """
    before = after = 0
    for node in calls(program, _AFFINE):
        scale_shift = _affine(program, node)
        if scale_shift is None:
            continue
        x, user = argument(node, 0), next(iter(node.users), node)
        fits_before = len(x.users) == 1 and _on_dimension_1(x, x)
        fits_after = len(node.users) == 1 and _on_dimension_1(user, x)
        if fits_before and _scale_output(program, x, *scale_shift):
            before += 1
        elif fits_after and _scale_input(program, node, user, *scale_shift):
            after += 1
        else:
            continue
        replace(node, x)
    where = f"({before} into the layer before, {after} after)"
    program.note(before + after, f"BatchNorm layers and channel scales folded {where}")


def _on_dimension_1(layer: Any, value: fx.Node) -> bool:
    """Are the channels that `layer` mixes dimension 1 of `value`, as BatchNorm's are?"""
    if layer.target in LINEARS:
        return len(shape(value)) == 2
    dims = {**CONVS, **TRANSPOSED}.get(layer.target)
    return dims is not None and len(shape(value)) == dims + 2


def _affine(program: Program, node: fx.Node) -> tuple[Tensor, Tensor | None] | None:
    """An operation as y = scale x + shift per channel, in float64; None if it is none."""
    if node.target is aten.batch_norm.default:
        return _own_statistics(program, node)
    vector = constant(program, argument(node, 1))
    x = argument(node, 0)
    if vector is None or node.kwargs or not isinstance(x, fx.Node) or shape(node) != shape(x):
        return None
    dims = len(shape(x))
    if dims < 3 or x.meta["val"].dtype != vector.dtype:
        return None
    channels = (1,) * (dims - vector.dim()) + tuple(vector.shape)
    if [str(size) for size in channels] != ["1", shape(x)[1], *["1"] * (dims - 2)]:
        return None
    numbers = vector.flatten().double()
    if node.target is aten.mul.Tensor:
        return numbers, None
    return torch.ones_like(numbers), numbers


def _own_statistics(program: Program, node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """BatchNorm with its own statistics as y = scale x + shift, in float64; None if it uses the
    batch's.
    """
    tensors = [constant(program, a) for a in node.args[1:5]]
    weight, bias, mean, variance = tensors
    missing = [a for a, tensor in zip(node.args[1:3], tensors, strict=False) if tensor is None]
    if argument(node, 5) or mean is None or variance is None or any(missing):
        return None
    scale = torch.rsqrt(variance.double() + argument(node, 7))
    scale = scale if weight is None else scale * weight.double()
    shift = -mean.double() * scale
    return scale, shift if bias is None else shift + bias.double()


def _scale_output(program: Program, node: fx.Node, scale: Tensor, shift: Tensor | None) -> bool:
    """Let a linear or convolution give `scale * y + shift` per output channel instead of y. False
    if it can't.
    """
    known = node.target in LINEARS or node.target in CONVS or node.target in TRANSPOSED
    own = _own_weight(program, node) if known else None
    if own is None:
        return False
    transposed = node.target in TRANSPOSED
    groups = argument(node, 6, 1) if transposed else 1
    _write(program, node, *scaled_output(*own, scale, shift, transposed=transposed, groups=groups))
    return True


def _own_weight(program: Program, node: fx.Node) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear or convolution, where they are constants that may be replaced."""
    weight, bias = own_constant(program, argument(node, 1)), constant(program, argument(node, 2))
    unknown = argument(node, 2) is not None and bias is None
    return None if weight is None or unknown else (weight, bias)


def _write(program: Program, node: fx.Node, weight: Tensor, bias: Tensor | None) -> None:
    name = argument(node, 1).target
    changes = {1: add_constant(program, node, f"{name}_scaled", weight)}
    if bias is not None:
        changes[2] = add_constant(program, node, f"{name}_bias", bias)
    set_arguments(node, changes)


def _scale_input(
    program: Program, x: fx.Node, node: fx.Node, scale: Tensor, shift: Tensor | None
) -> bool:
    """Let a linear or convolution take x where it took `scale * x + shift` (per input channel).
    False if it can't.
    """
    if node.op != "call_function" or argument(node, 0) is not x:
        return False
    if node.target in CONVS:
        padding = as_numbers(argument(node, 4, 0), CONVS[overload(node)])
        if shift is not None and (padding is None or any(padding)):
            return False  # the zeros around the image would have to become something else
    elif node.target not in LINEARS:
        return False
    own = _own_weight(program, node)
    if own is None:
        return False
    groups = argument(node, 6, 1) if node.target in CONVS else 1
    _write(program, node, *scaled_input(*own, scale, shift, groups=groups))
    return True


# The arithmetic.


def scaled_output(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    *,
    transposed: bool = False,
    groups: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer whose output y becomes `scale * y + shift`, per output channel; in
    the weight's dtype.

    weight is `[out, in / groups, ...]`, or `[in, out / groups, ...]` for a transposed convolution.
    Computed in float64.
    """
    w = weight.double()
    w = w * (_spread(scale, w, groups) if transposed else scale.reshape(-1, *[1] * (w.dim() - 1)))
    b = None if bias is None else bias.double() * scale
    if shift is not None:
        b = shift if b is None else b + shift
    return w.to(weight.dtype), None if b is None else b.to(weight.dtype)


def scaled_input(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    *,
    groups: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Weight `[out, in / groups, ...]` and bias of a layer that gets x instead of `scale * x +
    shift`, per input channel.
    """
    w = weight.double()
    b = None if bias is None else bias.double()
    if shift is not None:
        moved = (w * _spread(shift, w, groups)).flatten(1).sum(1)
        b = moved if b is None else b + moved
    return (w * _spread(scale, w, groups)).to(weight.dtype), None if b is None else b.to(
        weight.dtype
    )


def _spread(vector: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Numbers for dimension 1 of a weight, of all groups one after another, as the weight takes
    them.
    """
    rows, per_group = weight.shape[:2]
    parts = vector.reshape(groups, 1, per_group).expand(groups, rows // groups, per_group)
    return parts.reshape(rows, per_group, *[1] * (weight.dim() - 2))
