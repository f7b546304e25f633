"""Padding in numbers, and folded into the convolution behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from quantize.run.fusion.edit import (
    CONVS,
    CONVS_BY_WORD,
    PADS,
    add_constant,
    argument,
    calls,
    constant,
    overload,
    own_constant,
    set_arguments,
    weight_of,
)
from quantize.run.fusion.graph import Program, aten


def numbers(value: object, dims: int) -> list[int] | None:
    """One number per dimension, from a number or a list; None if they aren't known."""
    if isinstance(value, int):
        return [value] * dims
    if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
        return list(value) * dims if len(value) == 1 else list(value)
    return None


def number_padding(program: Program) -> None:
    """`padding="valid"` and `"same"` become numbers, which the other passes know; uneven padding an
    operator of its own.
    """
    for node in calls(program, CONVS_BY_WORD):
        target, dims = CONVS_BY_WORD[overload(node)]
        totals: list[int] | None = [0] * dims
        if argument(node, 4, "valid") != "valid":
            totals = _same_padding(program, node, dims)
        if totals is None:
            continue
        odd = [total % 2 for total in totals]
        if any(odd):
            set_arguments(node, {0: _padded_after(program, node, odd)})
        node.target = target
        set_arguments(node, {4: [total // 2 for total in totals]})


def _same_padding(program: Program, node: fx.Node, dims: int) -> list[int] | None:
    """Zeros that keep the image's size, both sides of a dimension together."""
    weight = constant(program, argument(node, 1))
    dilation = numbers(argument(node, 5, 1), dims)
    if weight is None or dilation is None:
        return None
    return [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]


def _padded_after(program: Program, node: fx.Node, zeros: list[int]) -> fx.Node:
    """The input of `node` with so many zeros after each of its last dimensions."""
    x = argument(node, 0)
    after: list[int] = []
    for zero in reversed(zeros):  # the last dimension comes first in `pad`
        after += [0, zero]
    value = x.meta["val"]
    image = value.shape[-len(zeros) :]
    wider = [size + zero for size, zero in zip(image, zeros, strict=True)]
    padded = value.new_empty((*value.shape[: -len(zeros)], *wider))
    with program.before(node):
        return program.call(aten.constant_pad_nd.default, x, after, val=padded)


def fold_padding(program: Program) -> None:
    """Zero padding in front of a convolution becomes the convolution's own; uneven padding by zeros
    in the kernel.
    """
    count = 0
    for node in calls(program, CONVS):
        pad = argument(node, 0)
        if _is_zero_padding(pad) and len(pad.users) == 1 and _absorb(program, node, pad):
            program.graph.erase_node(pad)
            count += 1
    program.note(count, "padding layers moved into convolutions")


def _is_zero_padding(node: object) -> bool:
    """Whether `node` adds zeros, as many on each side as a number says."""
    if not isinstance(node, fx.Node) or node.target not in PADS:
        return False
    if node.target is aten.constant_pad_nd.default:
        mode, value = "constant", argument(node, 2, 0)
    else:
        mode, value = argument(node, 2, "constant"), argument(node, 3)
    adds = all(isinstance(amount, int) and amount >= 0 for amount in argument(node, 1))
    return mode == "constant" and value in (None, 0, 0.0) and adds


def _absorb(program: Program, node: fx.Node, pad: fx.Node) -> bool:
    """Let a convolution read what `pad` pads, and add the zeros itself. False if it can't."""
    dims, amounts = CONVS[overload(node)], argument(pad, 1)
    padding = numbers(argument(node, 4, 0), dims)
    dilation = numbers(argument(node, 5, 1), dims)
    source, weight = argument(node, 1), weight_of(program, node)
    if padding is None or dilation is None or weight is None or len(amounts) > 2 * dims:
        return False
    sides = sides_of(amounts, dims)
    zeros = kernel_zeros(sides, dilation)
    if zeros is None:
        return False
    changes: dict[int, Any] = {}
    if any(zeros):
        prepared = source.meta.get("prepare")
        known = prepared or own_constant(program, source) is not None
        if not known or math.prod(weight.shape[2:]) == 1:
            return False
        wider = torch.nn.functional.pad(weight, zeros)
        if prepared:
            with program.before(node):
                changes[1] = program.call(aten.constant_pad_nd.default, source, zeros, val=wider)
            changes[1].meta["prepare"] = True
        else:
            changes[1] = add_constant(program, node, f"{source.target}_padded", wider)
    total = [own + max(side) for own, side in zip(padding, sides, strict=True)]
    set_arguments(node, changes | {0: argument(pad, 0), 4: total})
    return True


# The arithmetic.


def sides_of(amounts: Sequence[int], dims: int) -> list[tuple[int, int]]:
    """(before, after) of each dimension, the first one first.

    `amounts` are those of `torch.nn.functional.pad`: the last dimension first, the others left out.
    """
    given = [*amounts, *[0] * (2 * dims - len(amounts))]
    pairs = list(zip(given[::2], given[1::2], strict=True))
    return pairs[::-1]


def kernel_zeros(sides: list[tuple[int, int]], dilation: list[int]) -> list[int] | None:
    """Zeros around the kernel that shift it over an image padded by the larger side on both.

    Returns:
        Amounts for `torch.nn.functional.pad`, 0 where the sides are equal; None where the
        difference between two sides isn't a multiple of the dilation.
    """
    zeros: list[int] = []
    for side, step in zip(reversed(sides), reversed(dilation), strict=True):
        missing = [max(side) - amount for amount in side]
        if any(zero % step for zero in missing):
            return None
        zeros += [zero // step for zero in missing]
    return zeros
