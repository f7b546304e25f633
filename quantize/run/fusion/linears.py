"""Linear layers in one form, free of the views and permutations around them, and merged."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from quantize.run.fusion.edit import (
    LINEARS,
    add_constant,
    argument,
    calls,
    constant,
    drop_dead,
    is_call,
    loosen_views,
    own_constant,
    replace,
    shape,
)
from quantize.run.fusion.graph import Program, aten

_VIEWS = (aten.view.default, aten.reshape.default)


def linear_form(program: Program) -> None:
    """`addmm`, `mm` and `matmul` by a constant become `linear`, which the other passes know."""
    for node in calls(program, {aten.addmm.default, aten.mm.default, aten.matmul.default}):
        first = 1 if node.target is aten.addmm.default else 0
        bias = argument(node, 0) if first else None
        x, weight = argument(node, first), argument(node, first + 1)
        tensor = own_constant(program, weight)
        if tensor is None or tensor.dim() != 2 or node.kwargs or not tensor.is_floating_point():
            continue
        vector: Any = constant(program, bias)
        if bias is not None and (vector is None or vector.dim() != 1):
            continue
        transposed = add_constant(program, node, f"{weight.target}_t", tensor.t().contiguous())
        with program.before(node):
            new = program.call(aten.linear.default, x, transposed, *([bias] if bias else []))
        replace(node, new)


def through_views(program: Program) -> None:
    """`view` to rows, linear, `view` back (GPT-2's Conv1D) is the linear layer alone: it takes any
    number of dimensions.
    """
    for node in calls(program, LINEARS):
        rows, users = argument(node, 0), list(node.users)
        if len(users) != 1 or rows.target not in _VIEWS or users[0].target not in _VIEWS:
            continue
        back = users[0]
        x = argument(rows, 0)
        whole, result = shape(x), shape(back)
        widths = whole[-1:] == shape(rows)[-1:] and result[-1:] == shape(node)[-1:]
        if widths and len(shape(rows)) == 2 and whole[:-1] == result[:-1]:
            with program.before(back):
                new = program.call(node.target, x, *node.args[1:], **node.kwargs)
            replace(back, new)
            program.graph.erase_node(node)


def sink_permutes(program: Program) -> None:
    """`permute(y) + r` becomes `permute(y + permute back(r))`, so that the sum can join the linear
    layer that made y.
    """
    for node in calls(program, {aten.add.Tensor}):
        for permuted, other in (node.args, node.args[::-1]):
            if not node.kwargs and _can_sink(permuted, other):
                _sink(program, node, permuted, other)
                break
    for node in calls(program, {aten.permute.default}):
        inner = argument(node, 0)
        if not is_call(inner, aten.permute.default):
            continue
        order = [argument(inner, 1)[dim] for dim in argument(node, 1)]
        if order == list(range(len(order))):
            node.replace_all_uses_with(argument(inner, 0))


def _can_sink(permuted: Any, other: object) -> bool:
    """Is `permuted` a linear layer's output, permuted for this sum alone, and `other` as large?"""
    if not is_call(permuted, aten.permute.default) or len(permuted.users) != 1:
        return False
    y = argument(permuted, 0)
    if not isinstance(y, fx.Node) or y.target not in LINEARS or len(y.users) != 1:
        return False
    if not isinstance(other, fx.Node) or other.op == "get_attr":
        return False
    return shape(other) == shape(permuted)


def _sink(program: Program, node: fx.Node, permuted: Any, other: Any) -> None:
    y, order = argument(permuted, 0), list(argument(permuted, 1))
    inverse = [order.index(dim) for dim in range(len(order))]
    with program.before(node):
        back = program.call(aten.permute.default, other, inverse, val=y.meta["val"])
        total = program.call(aten.add.Tensor, back, y, val=y.meta["val"])
        result = program.call(aten.permute.default, total, order)
    replace(node, result)


def merge_linears(program: Program) -> int:
    """Linear layers on the same input (query, key and value; gate and up) become one, whose output
    is split. How many did.
    """
    count = 0
    for x, nodes in _on_shared_inputs(program).items():
        weights: list[Any] = [constant(program, argument(n, 1)) for n in nodes]
        dtypes = {weight.dtype for weight in weights}
        if len(nodes) > 1 and len(dtypes) == 1 and weights[0].is_floating_point():
            _merge(program, x, nodes, weights)
            count += len(nodes)
    if count:
        loosen_views(program)
    program.note(count, "linear layers on shared inputs merged")
    drop_dead(program)
    return count


def _on_shared_inputs(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """Linear layers with a weight of their own and a known bias, by their input."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in calls(program, LINEARS):
        bias = argument(node, 2)
        known = bias is None or constant(program, bias) is not None
        if known and own_constant(program, argument(node, 1)) is not None:
            groups.setdefault(argument(node, 0), []).append(node)
    return groups


def _merge(program: Program, x: fx.Node, nodes: list[fx.Node], weights: list[Any]) -> None:
    """One linear layer with the rows of all `weights`, and its output split among `nodes`."""
    first, sizes = nodes[0], [weight.shape[0] for weight in weights]
    name = f"{argument(first, 1).target}_merged"
    biases: list[Any] = [constant(program, argument(node, 2)) for node in nodes]
    bias = None
    if any(b is not None for b in biases):
        for i, weight in enumerate(weights):
            biases[i] = weight.new_zeros(sizes[i]) if biases[i] is None else biases[i]
        bias = add_constant(program, first, f"{name}_bias", torch.cat(biases))
    weight = add_constant(program, first, name, torch.cat(weights))
    operands = (x, weight) if bias is None else (x, weight, bias)
    value = first.meta["val"]
    with program.before(first):
        whole = value.new_empty((*value.shape[:-1], sum(sizes)))
        merged = program.call(aten.linear.default, *operands, val=whole)
        parts = program.call(aten.split_with_sizes.default, merged, sizes, -1)
        items = [program.call(operator.getitem, parts, i) for i in range(len(nodes))]
    for node, item in zip(nodes, items, strict=True):
        replace(node, item)
