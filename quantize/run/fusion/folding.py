"""Padding, BatchNorm and scales folded into the weights of the layer beside them.

The arithmetic is in the pure functions at the end, in float64; the passes find where it is legal.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from quantize.run.fusion.edit import (
    CONVS,
    CONVS_BY_WORD,
    LINEARS,
    PADS,
    TRANSPOSED,
    add_constant,
    argument,
    calls,
    constant,
    overload,
    own_constant,
    set_arguments,
    shape,
)
from quantize.run.fusion.graph import Program, aten


def number_padding(program: Program) -> None:
    """`padding="valid"` and `"same"` become numbers, which the other passes know; uneven padding an
    operator of its own.
    """
    for node in calls(program, CONVS_BY_WORD):
        target, dims = CONVS_BY_WORD[overload(node)]
        weight, dilation = (
            constant(program, argument(node, 1)),
            _numbers(argument(node, 5, 1), CONVS[target]),
        )
        if argument(node, 4, "valid") == "valid":
            padding = [0] * dims
        elif weight is None or dilation is None:
            continue
        else:
            totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            padding = [t // 2 for t in totals]
            if any(t % 2 for t in totals):  # the odd one is added after the image
                after = [side for t in totals[::-1] for side in (0, t % 2)]
                x = argument(node, 0)
                with program.graph.inserting_before(node):
                    padded = program.graph.call_function(aten.constant_pad_nd.default, (x, after))
                sizes = x.meta["val"].shape
                wide = [s + t % 2 for s, t in zip(sizes[-dims:], totals, strict=True)]
                padded.meta["val"] = x.meta["val"].new_empty((*sizes[:-dims], *wide))
                set_arguments(node, {0: padded})
        node.target = target
        set_arguments(node, {4: padding})


def fold_padding(program: Program) -> None:
    """Zero padding in front of a convolution becomes the convolution's own; uneven padding by zeros
    in the kernel.
    """
    count = 0
    for node in calls(program, CONVS):
        pad, dims = argument(node, 0), CONVS[overload(node)]
        if not isinstance(pad, fx.Node) or pad.target not in PADS or len(pad.users) != 1:
            continue
        mode, value = (
            ("constant", argument(pad, 2, 0))
            if pad.target is aten.constant_pad_nd.default
            else (
                argument(pad, 2, "constant"),
                argument(pad, 3),
            )
        )
        amounts = argument(pad, 1)
        if (
            mode != "constant"
            or value not in (None, 0, 0.0)
            or not all(isinstance(p, int) and p >= 0 for p in amounts)
        ):
            continue
        padding, dilation = (
            _numbers(argument(node, 4, 0), dims),
            _numbers(argument(node, 5, 1), dims),
        )
        weight = constant(program, argument(node, 1))
        if padding is None or dilation is None or weight is None or len(amounts) > 2 * dims:
            continue
        amounts = list(amounts) + [0] * (2 * dims - len(amounts))
        sides = [(amounts[2 * i], amounts[2 * i + 1]) for i in range(dims)][
            ::-1
        ]  # the last dimension comes first in `pad`
        most = [max(side) for side in sides]
        extra = [(m - left, m - right) for m, (left, right) in zip(most, sides, strict=True)]
        if any(e % d for pair, d in zip(extra, dilation, strict=True) for e in pair):
            continue
        if any(e for pair in extra for e in pair):
            if own_constant(program, argument(node, 1)) is None or math.prod(weight.shape[2:]) == 1:
                continue
            flat = [
                e // d for pair, d in zip(extra[::-1], dilation[::-1], strict=True) for e in pair
            ]
            wider = torch.nn.functional.pad(weight, flat)
            set_arguments(
                node, {1: add_constant(program, node, f"{argument(node, 1).target}_padded", wider)}
            )
        set_arguments(
            node, {0: argument(pad, 0), 4: [p + m for p, m in zip(padding, most, strict=True)]}
        )
        program.graph.erase_node(pad)
        count += 1
    if count:
        program.notes.append(f"{count} padding layers moved into convolutions")


def _numbers(value: object, dims: int) -> list[int] | None:
    if isinstance(value, int):
        return [value] * dims
    if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
        return list(value) * dims if len(value) == 1 else list(value)
    return None


def fold_batch_norm(program: Program) -> None:
    """BatchNorm into the convolution, transposed convolution or linear layer before it, or else
    after it.
    """
    before = after = 0
    for node in calls(program, {aten.batch_norm.default}):
        scale_shift = _affine(program, node)
        if scale_shift is None:
            continue
        x, user = argument(node, 0), next(iter(node.users), node)
        if len(x.users) == 1 and _on_dimension_1(x, x) and _scale_output(program, x, *scale_shift):
            before += 1
        elif (
            len(node.users) == 1
            and _on_dimension_1(user, x)
            and _scale_input(program, node, user, *scale_shift)
        ):
            after += 1
        else:
            continue
        node.replace_all_uses_with(x)
        program.graph.erase_node(node)
    if before or after:
        program.notes.append(
            f"{before + after} BatchNorm layers folded ({before} into the layer before, {after} "
            f"after)"
        )


def _on_dimension_1(layer: Any, value: fx.Node) -> bool:
    """Are the channels that `layer` mixes dimension 1 of `value`, as BatchNorm's are?"""
    if layer.target in LINEARS:
        return len(shape(value)) == 2
    dims = {**CONVS, **TRANSPOSED}.get(layer.target)
    return dims is not None and len(shape(value)) == dims + 2


def _affine(program: Program, node: fx.Node) -> tuple[torch.Tensor, torch.Tensor] | None:
    """BatchNorm with its own statistics as y = scale x + shift, in float64; None if it uses the
    batch's.
    """
    weight, bias, mean, variance = (constant(program, a) for a in node.args[1:5])
    if argument(node, 5) or mean is None or variance is None:
        return None
    if (argument(node, 1) is not None and weight is None) or (
        argument(node, 2) is not None and bias is None
    ):
        return None
    scale = torch.rsqrt(variance.double() + argument(node, 7))
    scale = scale if weight is None else scale * weight.double()
    shift = -mean.double() * scale
    return scale, shift if bias is None else shift + bias.double()


def _scale_output(
    program: Program, node: fx.Node, scale: torch.Tensor, shift: torch.Tensor | None
) -> bool:
    """Let a linear or convolution give `scale * y + shift` per output channel instead of y. False
    if it can't.
    """
    known = node.op == "call_function" and (
        node.target in LINEARS or node.target in CONVS or node.target in TRANSPOSED
    )
    if not known:
        return False
    weight, bias = own_constant(program, argument(node, 1)), constant(program, argument(node, 2))
    if weight is None or (argument(node, 2) is not None and bias is None):
        return False
    groups = argument(node, 6, 1) if node.target in TRANSPOSED else 1
    new_weight, new_bias = scaled_output(
        weight, bias, scale, shift, transposed=node.target in TRANSPOSED, groups=groups
    )
    changes = {1: add_constant(program, node, f"{argument(node, 1).target}_scaled", new_weight)}
    if new_bias is not None:
        changes[2] = add_constant(program, node, f"{argument(node, 1).target}_bias", new_bias)
    set_arguments(node, changes)
    return True


def _scale_input(
    program: Program, x: fx.Node, node: fx.Node, scale: torch.Tensor, shift: torch.Tensor | None
) -> bool:
    """Let a linear or convolution take x where it took `scale * x + shift` (per input channel).
    False if it can't.
    """
    if node.op != "call_function" or argument(node, 0) is not x:
        return False
    if node.target in CONVS:
        padding = _numbers(argument(node, 4, 0), CONVS[overload(node)])
        if shift is not None and (padding is None or any(padding)):
            return False  # the zeros around the image would have to become something else
    elif node.target not in LINEARS:
        return False
    weight, bias = own_constant(program, argument(node, 1)), constant(program, argument(node, 2))
    if weight is None or (argument(node, 2) is not None and bias is None):
        return False
    groups = argument(node, 6, 1) if node.target in CONVS else 1
    new_weight, new_bias = scaled_input(weight, bias, scale, shift, groups=groups)
    changes = {1: add_constant(program, node, f"{argument(node, 1).target}_scaled", new_weight)}
    if new_bias is not None:
        changes[2] = add_constant(program, node, f"{argument(node, 1).target}_bias", new_bias)
    set_arguments(node, changes)
    return True


def fold_scales(program: Program) -> None:
    """Scales of RMSNorm, LayerNorm and layer scale: a constant vector multiplied onto a linear
    layer's input or output.
    """
    count = 0
    for node in calls(program, {aten.mul.Tensor}):
        for scale, x in (node.args, node.args[::-1]):
            vector = constant(program, scale)
            if (
                vector is None
                or not isinstance(x, fx.Node)
                or vector.dim() != 1
                or shape(node) != shape(x)
            ):
                continue
            if (
                "val" not in x.meta
                or x.meta["val"].dtype != vector.dtype
                or x.meta["val"].dtype != node.meta["val"].dtype
            ):
                continue
            if (
                x.target in LINEARS
                and len(x.users) == 1
                and _scale_output(program, x, vector.double(), None)
            ):
                node.replace_all_uses_with(x)
            elif _all_scale_input(program, node, vector.double(), None):
                node.replace_all_uses_with(x)
            else:
                continue
            program.graph.erase_node(node)
            count += 1
            break
    for node in calls(program, {aten.layer_norm.default}):
        vector, shift = constant(program, argument(node, 2)), constant(program, argument(node, 3))
        if vector is None or vector.dim() != 1 or (argument(node, 3) is not None and shift is None):
            continue
        if _all_scale_input(
            program, node, vector.double(), None if shift is None else shift.double()
        ):
            set_arguments(node, {2: None, 3: None})
            count += 1
    if count:
        program.notes.append(f"{count} norm and layer scales folded into linear layers")


def _all_scale_input(
    program: Program, x: fx.Node, scale: torch.Tensor, shift: torch.Tensor | None
) -> bool:
    """`_scale_input` for all users of x, or for none."""
    users = list(x.users)
    possible = users and all(
        u.target in LINEARS and argument(u, 0) is x
        and own_constant(program, argument(u, 1)) is not None
        and (argument(u, 2) is None or constant(program, argument(u, 2)) is not None)
        and list(u.all_input_nodes).count(x) == 1
        for u in users
    )  # fmt: skip
    if not possible:
        return False
    for user in users:
        _scale_input(program, x, user, scale, shift)
    return True


# The arithmetic.


def scaled_output(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    *,
    transposed: bool = False,
    groups: int = 1,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a layer whose output y becomes `scale * y + shift`, per output channel; in
    the weight's dtype.

    weight is `[out, in / groups, ...]`, or `[in, out / groups, ...]` for a transposed convolution.
    Computed in float64.
    """
    w = weight.double()
    if transposed:
        inputs, per_group = w.shape[:2]
        factors = (
            scale.reshape(groups, 1, per_group)
            .expand(groups, inputs // groups, per_group)
            .reshape(inputs, per_group)
        )
        w = w * factors.reshape(inputs, per_group, *[1] * (w.dim() - 2))
    else:
        w = w * scale.reshape(-1, *[1] * (w.dim() - 1))
    b = None if bias is None else bias.double() * scale
    if shift is not None:
        b = shift if b is None else b + shift
    return w.to(weight.dtype), None if b is None else b.to(weight.dtype)


def scaled_input(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    *,
    groups: int = 1,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight `[out, in / groups, ...]` and bias of a layer that gets x instead of `scale * x +
    shift`, per input channel.
    """
    w = weight.double()
    out, per_group = w.shape[:2]

    def per_output(vector: torch.Tensor) -> torch.Tensor:  # [in] -> [out, in / groups, 1, ...]
        rows = (
            vector.reshape(groups, 1, per_group)
            .expand(groups, out // groups, per_group)
            .reshape(out, per_group)
        )
        return rows.reshape(out, per_group, *[1] * (w.dim() - 2))

    b = None if bias is None else bias.double()
    if shift is not None:
        moved = (w * per_output(shift)).flatten(1).sum(1)
        b = moved if b is None else b + moved
    return (w * per_output(scale)).to(weight.dtype), None if b is None else b.to(weight.dtype)
