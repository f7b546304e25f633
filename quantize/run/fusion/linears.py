"""Linear layers in one form, free of the views around them."""

from __future__ import annotations

from typing import Any

from quantize.run.fusion.edit import (
    LINEARS,
    add_constant,
    argument,
    calls,
    constant,
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
