"""Activations that a model writes out operator by operator, as one operator each."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from quantize.run.fusion.edit import argument, calls, is_call, replace
from quantize.run.fusion.graph import Program, aten


def activations(program: Program) -> None:
    """Activations that are spelt out operator by operator become one: `x * sigmoid(x)` and the tanh
    form of GELU.
    """
    found = 0
    for node in calls(program, {aten.mul.Tensor}):
        new: Any = None
        for a, b in (node.args, reversed(node.args)):
            if is_call(b, aten.sigmoid.default) and argument(b, 0) is a and len(b.users) == 1:
                new = (aten.silu.default, (a,), {})
            x = _tanh_gelu(a, b)
            if x is not None:
                new = (aten.gelu.default, (x,), {"approximate": "tanh"})
        if new and isinstance(new[1][0], fx.Node):
            with program.before(node):
                replace(node, program.call(new[0], *new[1], **new[2]))
            found += 1
    program.note(found, "activations written out in operators made one operator each")


def _before(node: object, target: object, value: float, near: float = 1e-9) -> Any:
    """x of `x op value`; None for everything else."""
    if not is_call(node, target) or len(node.args) != 2 or node.kwargs:
        return None
    number = argument(node, 1)
    known = isinstance(number, (int, float)) and abs(number - value) <= near
    return argument(node, 0) if known else None


def _tanh_gelu(half: object, one_plus: object) -> Any:
    """x if half is 0.5 x and one_plus is 1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)) (Hendrycks and
    Gimpel, arXiv 1606.08415).
    """
    x, tanh = _before(half, aten.mul.Tensor, 0.5), _before(one_plus, aten.add.Tensor, 1.0)
    inner = argument(tanh, 0) if is_call(tanh, aten.tanh.default) else None
    total = _before(inner, aten.mul.Tensor, math.sqrt(2 / math.pi), near=1e-6)
    if not is_call(total, aten.add.Tensor) or total.kwargs or argument(total, 0) is not x:
        return None
    cube = _before(argument(total, 1), aten.mul.Tensor, 0.044715)
    return x if _before(cube, aten.pow.Tensor_Scalar, 3.0) is x else None
