"""Int8 convolutions in oneDNN's kernels, as stock operators on weights packed beforehand.

An export that keeps int8 convolutions whole (`int8_images.whole_in_graphs`) gives one operator for
each; here it becomes `onednn.qconv_pointwise`, what `torch.compile` makes of quantized models. Two
things differ from the layer itself: the whole batch shares one range, where the layer has one for
each sample, or each pixel where the kernel is one pixel; and oneDNN rounds its results in an order
of its own. How much the first costs is bounded where the file is compared with the model, see
`Checker`. On a CPU without VNNI such kernels may cut off sums at 16 bits: none is put in there, and
a file from elsewhere refuses to load.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from quantize.run.fusion import torchscript
from quantize.run.fusion.edit import (
    add_constant,
    argument,
    calls,
    drop_dead,
    is_call,
    loosen_views,
    may_be_view,
    replace,
    shape,
)
from quantize.run.fusion.graph import CaptureError, Program, aten
from quantize.run.fusion.kernels import activation_of, hint, sole_user

CONVOLUTION = torch.ops.quantize.int8_conv.default
_onednn = torch.ops.onednn
_ACTIVATIONS = {"relu", "hardtanh", "swish", "hardswish"}  # of oneDNN's int8 convolutions
_PASS_ON = {  # operators that make no number negative
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
}
_FRESH = {  # operators whose results have memory of their own here
    _onednn.qconv_pointwise.tensor,
    _onednn.qconv2d_pointwise.binary_tensor,
    torch.ops.mkldnn._convolution_pointwise.default,
    aten.max_pool2d.default,
    aten.relu.default,
    aten.relu_.default,
}
_SMALLEST = 1e-30  # step of an image of zeros


# The largest sums, in TorchScript: for this process, and for one that loads a file.
_TRIAL = """
x = torch.full([1, 16, 4, 4], 255, dtype=torch.uint8)
weight = torch.full([16, 16, 3, 3], 127, dtype=torch.int8)
scale, zeros, one = torch.ones([16]), torch.zeros([16], dtype=torch.long), [1, 1]
packed = torch.ops.onednn.qconv_prepack(weight, scale, 1.0, 0, one, one, one, 1, None)
none = torch.jit.annotate(List[Optional[number]], [])
y = torch.ops.onednn.qconv_pointwise(
    x, torch.tensor(0.5), torch.tensor(7), packed, scale, zeros, None, one, one, one, 1,
    1.0, 0, torch.float, "none", none, "")
expected = torch.conv2d((x.float() - 7) / 2, weight.float(), None, one, one)
exact = torch.allclose(y, expected) and torch.equal(packed.to_dense(), weight)
""".strip().splitlines()
REFUSES = (
    'assert exact, "this CPU cuts int8 convolutions off at 16 bits, having no VNNI: '
    'fuse the model here"'
)


@functools.cache
def available() -> bool:
    """Does this build multiply in int8 here, with the right numbers? Without VNNI, sums of two
    products may be cut off at 16 bits.
    """
    return torchscript.succeeds(_TRIAL)


@dataclass
class _Image:
    """A tensor in 8 bits: the nodes of its bytes, of the step between two of them, and of that
    which stands for 0.
    """

    q: fx.Node
    step: fx.Node
    zero: fx.Node


def use_integers(program: Program) -> int:
    """Replace int8 convolutions by packed kernels, with the activation that follows. How many."""
    images: dict[fx.Node, _Image] = {}
    nodes = calls(program, {CONVOLUTION})
    for node in nodes:
        _refuse_columns(program, node)
        x = argument(node, 0)
        if x not in images:
            images[x] = _quantized(program, node, x)
        last, name, scalars = node, "none", []
        user = sole_user(node)
        found = None if user is None else activation_of(user)
        if user is not None and found is not None and found[0] in _ACTIVATIONS:
            last, name, scalars = user, found[0], [*found[1]]
        new = _kernel(program, node, last, images[x], (name, scalars, ""))
        new.meta["positive"] = _cuts_off(name, scalars)
        replace(last, new)
    drop_dead(program)
    if nodes:
        loosen_views(program)
        program.at_load = [*_TRIAL, REFUSES]
    program.note(len(nodes), "int8 convolutions as packed kernels")
    return len(nodes)


def _refuse_columns(program: Program, node: fx.Node) -> None:
    """oneDNN 3 is wrong where a window of several pixels that moves by several gives images of
    one column: the program takes no sizes that lead there.
    """
    kernel, strides = argument(node, 1).meta["val"].shape[2:], argument(node, 4)
    if len(kernel) != 2 or max(kernel) == 1 or max(strides) == 1:
        return
    known = {}
    for i, sizes in enumerate(program.sizes):
        known |= {size: f"input_{i}.size({d})" for d, size in enumerate(sizes)}
    height, width = (
        re.sub(r"[A-Za-z_]\w*", lambda m: known[m[0]], str(size))
        for size in node.meta["val"].shape[2:]
    )
    condition = f"{width} > 1 or {height} <= 1"
    if not height.isdigit() or not width.isdigit():
        program.conditions += [condition] if condition not in program.conditions else []
    elif int(width) == 1 and int(height) > 1:
        raise CaptureError(f"a convolution gives images of {height} x {width} pixels")


# ------------------------------------------------------------------------------------------------
# quantizing


def _quantized(program: Program, near: fx.Node, x: fx.Node) -> _Image:
    """x in 8 bits over the range of all its numbers, for `near` and what comes after it."""
    call = program.call
    with program.before(near):
        high = call(aten.amax.default, x)
        if _is_positive(x):
            zero = add_constant(program, near, "zero", torch.tensor(0))
            half = add_constant(program, near, "half", torch.tensor(0.5))
            span = high
        else:
            high = call(aten.clamp_min.default, high, 0.0)
            low = call(aten.clamp_max.default, call(aten.amin.default, x), 0.0)
            span = call(aten.sub.Tensor, high, low)
        span = call(aten.mul.Tensor, span, 1 / 255)
        step = call(aten.clamp_min.default, span, _SMALLEST)
        inverse = call(aten.reciprocal.default, step)
        if not _is_positive(x):
            nearest = call(aten.mul.Tensor, call(aten.neg.default, low), inverse)
            nearest = call(aten.round.default, nearest)
            zero = call(aten.to.dtype, nearest, torch.int64)
            half = call(aten.add.Tensor, nearest, 0.5)
        factor = call(aten.item.default, inverse)
        q = call(aten.add.Tensor, half, x, alpha=factor)
        q = call(aten.to.dtype, q, torch.uint8, val=x.meta["val"].to(torch.uint8))
    return _Image(q, step, zero)


def _is_positive(x: fx.Node) -> bool:
    """Is no number of it below 0?"""
    if "positive" in x.meta:
        return bool(x.meta["positive"])
    if x.target in _PASS_ON:
        return _is_positive(argument(x, 0))
    found = activation_of(x) if x.op == "call_function" else None
    return found is not None and _cuts_off(*found[:2])


def _cuts_off(name: str, scalars: Sequence[float]) -> bool:
    """Does this activation leave nothing below 0?"""
    return name in ("relu", "sigmoid") or (name == "hardtanh" and scalars[0] >= 0)


# ------------------------------------------------------------------------------------------------
# kernels


def _kernel(
    program: Program,
    node: fx.Node,
    last: fx.Node,
    image: _Image,
    activation: tuple[str, list[float], str],
) -> fx.Node:
    arguments: Any = node.args
    _, weight, scale, bias, stride, dilation, padding, _, groups = arguments[:9]
    stride, padding, dilation = list(stride), list(padding), list(dilation)
    sizes = image.q.meta["val"].shape
    expected = [max(1, hint(sizes[0]) // program.widened), *map(hint, sizes[1:])]
    moves = (stride, padding, dilation, groups)
    call, pack = program.call, _onednn.qconv_prepack.default
    with program.before(node):
        packed = call(pack, weight, scale, 1.0, 0, *moves, expected)
        # a weight of one dimension comes back with two
        packed.meta["prepare"] = "{}.to_dense()" + (".squeeze(2)" if len(stride) == 1 else "")
        zeros = call(aten.zeros_like.default, scale, dtype=torch.int64)
        zeros.meta["prepare"] = "{}"
    with program.before(last):
        how = (image.step, image.zero, packed, scale, zeros, bias, *moves)
        result = (1.0, 0, torch.float32, *activation)
        return call(_onednn.qconv_pointwise.tensor, image.q, *how, *result)


def add_in_place(program: Program) -> None:
    """Let a convolution add its results to another image where this is read for the last time."""
    count = 0
    for node in calls(program, {aten.add.Tensor, aten.add_.Tensor}):
        first, second = argument(node, 0), argument(node, 1)
        for conv, other in ((first, second), (second, first)):
            if not node.kwargs and _can_add(conv, other, node):
                _add(program, node, conv, other)
                count += 1
                break
    program.note(count, "residual adds fused into them")


def _can_add(conv: Any, other: Any, node: fx.Node) -> bool:
    if not is_call(conv, _onednn.qconv_pointwise.tensor) or not isinstance(other, fx.Node):
        return False
    plain = argument(conv, 14) == "none" and len(conv.users) == 1 and len(shape(conv)) == 4
    fresh = other.target in _FRESH
    earlier = [user for user in other.users if user is not node]
    free = all(u < node and not may_be_view(u) for u in earlier)
    return plain and fresh and free and shape(conv) == shape(other)


def _add(program: Program, node: fx.Node, conv: fx.Node, other: fx.Node) -> None:
    last, name = node, "none"
    user = sole_user(node)
    if user is not None and user.target in (aten.relu.default, aten.relu_.default):
        last, name = user, "relu"
    x, step, zero, packed, scale, zeros, bias, *moves = conv.args[:11]
    into = (other, bias, *moves, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, name, [], "")
    kernel = _onednn.qconv2d_pointwise.binary_tensor
    with program.before(last):
        new = program.call(kernel, x, step, zero, packed, scale, zeros, *into)
    replace(last, new)
    for done in [conv] if last is node else [node, conv]:  # what writes isn't dropped as dead
        program.graph.erase_node(done)
