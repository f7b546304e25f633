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


def _scalar(node: object, target: object) -> tuple[object, float] | None:
    """(x, c) of `x op c`."""
    if (
        is_call(node, target)
        and len(node.args) == 2
        and isinstance(argument(node, 1), (int, float))
        and not node.kwargs
    ):
        return argument(node, 0), float(argument(node, 1))
    return None


def _tanh_gelu(half: object, one_plus: object) -> object | None:
    """x if half is 0.5 x and one_plus is 1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)) (Hendrycks and
    Gimpel, arXiv 1606.08415).
    """
    left, right = _scalar(half, aten.mul.Tensor), _scalar(one_plus, aten.add.Tensor)
    if (
        not left
        or not right
        or left[1] != 0.5
        or right[1] != 1.0
        or not is_call(right[0], aten.tanh.default)
    ):
        return None
    scaled = _scalar(argument(right[0], 0), aten.mul.Tensor)
    if (
        not scaled
        or abs(scaled[1] - math.sqrt(2 / math.pi)) > 1e-6
        or not is_call(scaled[0], aten.add.Tensor)
    ):
        return None
    x, cubic = scaled[0].args[:2]
    small = _scalar(cubic, aten.mul.Tensor)
    if not small or abs(small[1] - 0.044715) > 1e-9 or scaled[0].kwargs:
        return None
    power = _scalar(small[0], aten.pow.Tensor_Scalar)
    return x if power and power == (x, 3.0) and x is left[0] else None
