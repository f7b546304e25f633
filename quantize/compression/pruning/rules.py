"""Rules for operations that compute: products, convolutions, norms, attention, reductions.

What a rule works with: `trace.Op`. Operations that only move data: moves.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantize.compression.pruning.labels import Value, varying
from quantize.compression.pruning.trace import Op, Rules

WINDOWS = {
    1: set(
        "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d "
        "upsample_linear1d".split()
    )
}
WINDOWS[2] = set(
    "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d max_pool2d_with_indices "
    "upsample_nearest2d "
    "upsample_bilinear2d upsample_bicubic2d reflection_pad2d replication_pad2d lp_pool2d".split()
)
WINDOWS[3] = set(
    "max_pool3d avg_pool3d adaptive_avg_pool3d upsample_nearest3d upsample_trilinear3d".split()
)
REDUCTIONS = set(
    "mean sum amax amin max min var std prod norm linalg_vector_norm logsumexp argmax argmin "
    "all any var_mean std_mean".split()
)
# keep their shape
ALONG = set(
    "softmax _softmax log_softmax _log_softmax cumsum cumprod sort topk argsort cummax".split()
)

RULES = Rules()
SEES_WEIGHTS = set("linear addmm matmul mm bmm embedding conv1d conv2d conv3d".split())
SEES_WEIGHTS |= set("conv_transpose1d conv_transpose2d conv_transpose3d".split())


FIXED = " mixes it with data that can't shrink"


# Products.


def _linear(op: Op, x: Value, weight: Value, bias: Value | None, *, inner: int) -> Value:
    """x [..., K] times a weight whose dimension `inner` is K."""
    trace, why = op.trace, op.why
    parameter = trace.labels.weight(weight)
    if parameter is None or len(weight.shape) != 2:
        trace.weight_is_computed(x.labels, why)
        return Value(op.shape)
    name, order = parameter
    last = len(x.shape) - 1
    if varying(x.labels) - {last}:  # mixes one axis and leaves the labelled one alone
        read = op.across(x, [last])
        trace.consume(name, order[inner], None, why)
        out = trace.produce(name, order[1 - inner], why)
        op.pin(out, ": another axis of its input carries channels")
        return op.settled(read)
    trace.consume(name, order[inner], x.labels, why)
    out = trace.produce(name, order[1 - inner], why)
    trace.vector(bias, out, len(out), why)
    return op.along(-1, out)


@RULES.of("linear")
def _(op: Op) -> Value:
    x, weight, bias = op.arguments("input", "weight", "bias")
    return _linear(op, x, weight, bias, inner=1)


@RULES.of("addmm")
def _(op: Op) -> Value:
    bias, x, weight = op.arguments("input", "mat1", "mat2")
    return _linear(op, x, weight, bias, inner=0)


@RULES.of("matmul", "mm", "bmm")
def _(op: Op) -> Value:
    a, b = op.arguments("input", "other")
    if b.source and len(b.shape) == 2 and not a.source:
        return _linear(op, a, b, None, inner=0)
    if min(len(a.shape), len(b.shape)) < 2 or a.source or b.source:
        for operand in (a, b):
            op.unfollowed(operand)
            if operand.source:
                op.trace.pin_parameter(operand, f"{op.why} can't be followed")
        return Value(op.shape)
    left, right = _in_whole_heads(op, a), _in_whole_heads(op, b)
    if _batched(left) or _batched(right):
        return _by_heads(op, left, right)
    return _matrices(op, left, right)


def _batched(value: Value) -> set[int]:
    """Axes in front of the matrix along which the labels change: heads."""
    axes = len(value.shape)
    return varying(value.labels) - {axes - 1, axes - 2}


def _in_whole_heads(op: Op, value: Value) -> Value:
    """With channels in front of the matrix, what changes inside of it goes together."""
    if not _batched(value):
        return value
    return Value(value.shape, op.across(value, [-1, -2]))


def _by_heads(op: Op, left: Value, right: Value) -> Value:
    """A batch of products: the heads of both operands go together."""
    heads = []
    for operand in (left, right):
        labels = operand.labels
        if not _batched(operand):
            op.pin(labels)
            labels = None
        heads.append(_heads(operand.shape, labels))
    met = op.met(heads, (*op.shape[:-2], 1, 1), FIXED)
    return op.result(met.labels)


def _heads(shape: tuple[int, ...], labels: Tensor | None) -> Value:
    """A value of a batch of matrices whose labels don't change inside of these."""
    return Value((*shape[:-2], 1, 1), labels)


def _matrices(op: Op, left: Value, right: Value) -> Value:
    """A product of two computed matrices, [..., M, K] and [..., K, N]."""
    rows, columns = len(left.shape) - 2, len(right.shape) - 1
    in_left, in_right = varying(left.labels), varying(right.labels)
    left_summed = in_left == {rows + 1}
    right_summed = in_right == {columns - 1}
    if left_summed or right_summed:
        size = left.shape[-1]
        op.tie(_flat(left, left_summed, size), _flat(right, right_summed, size))
    if right.labels is not None and in_right == {columns} and not in_left - {rows + 1}:
        return op.along(-1, right.labels.flatten())
    if left.labels is not None and in_left == {rows} and not in_right - {columns - 1}:
        return op.along(-2, left.labels.flatten())
    for operand in (left, right):
        if varying(operand.labels):
            op.unfollowed(operand)
    return Value(op.shape)


def _flat(value: Value, labelled: bool, size: int) -> Tensor:
    """The labels along the one axis that has them, or as many blanks."""
    if value.labels is None or not labelled:
        return torch.full((size,), -1)
    return value.labels.flatten()


@RULES.of("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _(op: Op) -> Value:
    x, weight, bias = op.arguments("input", "weight", "bias")
    # (..., output_padding, groups, dilation) if transposed; else (..., dilation, groups)
    groups = op.argument(6, "groups", 1)
    trace, why = op.trace, op.why
    parameter = trace.labels.weight(weight)
    spatial = len(weight.shape) - 2
    channel = len(x.shape) - spatial - 1
    read = op.across(x, range(channel + 1, len(x.shape)))
    if parameter is None:
        trace.weight_is_computed(read, why)
        return Value(op.shape)
    if varying(read) - {channel}:
        return op.unfollowed(Value(x.shape, read))
    name, order = parameter
    taken = _flat(Value(x.shape, read), True, x.shape[channel])
    transposed = "transpose" in op.name
    inputs, outputs = (0, 1) if transposed else (1, 0)
    if groups > 1 and transposed:  # weight [C_in, C_out / groups, ...]: only whole inputs could go
        op.pin(taken, ": a grouped transposed convolution")
        return Value(op.shape)
    if groups == 1:
        trace.consume(name, order[inputs], taken, why)
    out = trace.produce(name, order[outputs], why)
    if groups > 1:  # a group of inputs goes with its group of outputs
        together = out.view(groups, -1)
        first = together[:, :1]
        op.tie(together, first)
        op.tie(taken.view(groups, -1), first, " reads other data too")
    trace.vector(bias, out, len(out), why)
    return op.along(channel, out)


@RULES.of("embedding")
def _(op: Op) -> Value:
    parameter = op.trace.labels.weight(op.argument(0, "weight"))
    if parameter is None:
        op.trace.weight_is_computed(None, op.why)
        return Value(op.shape)
    name, order = parameter
    return op.along(-1, op.trace.produce(name, order[1], op.why))


# Norms and attention.


@RULES.of("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def _(op: Op) -> Any:
    names = ("input", "weight", "bias", "running_mean", "running_var")
    x, *vectors = op.arguments(*names)
    labels = op.across(x, range(2, len(x.shape)))
    for vector in vectors:
        op.trace.vector(vector, labels, x.shape[1], op.why)
    return op.settled(labels, shape=x.shape)


@RULES.of("prelu")
def _(op: Op) -> Value:
    x, weight = op.arguments("self", "weight")
    if weight.shape in ((), (1,)):
        return op.result(x.labels)
    labels = op.across(x, [dim for dim in range(len(x.shape)) if dim != 1])
    op.trace.vector(weight, labels, x.shape[1], op.why)
    return op.settled(labels)


@RULES.of("group_norm")
def _(op: Op) -> Value:
    x, groups, weight, bias = op.arguments("input", "num_groups", "weight", "bias")
    labels = op.across(x, range(2, len(x.shape)))
    if labels is not None and labels.shape[1] > 1:
        together = labels.reshape(groups, -1)
        if groups == 1:
            op.pin(labels, " averages over the channels")
        else:
            op.tie(together, together[:, :1])
    for vector in (weight, bias):
        op.trace.vector(vector, labels, x.shape[1], op.why)
    return op.settled(labels)


@RULES.of("layer_norm", "rms_norm")
def _(op: Op) -> Value:
    x, normalized = op.arguments("input", "normalized_shape")
    axes = len(op.shape)
    labels = op.across(x, range(axes - len(normalized), axes), " averages over the channels")
    return op.settled(labels)


@RULES.of("scaled_dot_product_attention")
def _(op: Op) -> Value:
    *parts, mask = op.arguments("query", "key", "value", "attn_mask")
    queries = op.shape[-3]
    heads = []
    for part in parts:
        labels = op.across(part, [-1, -2], " needs whole heads")
        grouped = part.shape[-3] != queries  # several queries share a key and a value
        if grouped and labels is not None and labels.shape[-3] > 1:
            labels = labels.repeat_interleave(queries // part.shape[-3], -3)
        heads.append(_heads(op.shape, labels))
    if isinstance(mask, Value):
        heads.append(_heads(mask.shape, op.across(mask, [-1, -2])))
    met = op.met(heads, (*op.shape[:-2], 1, 1), FIXED)
    return op.result(met.labels)


# Reductions, windows, softmax.


@RULES.of(*REDUCTIONS)
def _(op: Op) -> Any:
    x = op.argument(0, "self")
    target = str(op.node.target)
    if target.endswith(".other"):
        return op.met(op.trace.tensors(op.node.args), op.shape)  # max(a, b)
    axes = len(x.shape)
    dims = op.argument(2 if "norm" in target else 1, "dim")
    if dims is None:
        dims = range(axes)
    elif isinstance(dims, int):
        dims = [dims]
    dims = [dim % axes for dim in dims]
    labels = op.across(x, dims, " runs over the channels")
    one = op.shape[0] if isinstance(op.shape, list) else op.shape
    if labels is not None and len(one) != axes:
        kept = [size for dim, size in enumerate(labels.shape) if dim not in dims]
        labels = labels.reshape(kept)
    return op.result(labels)


@RULES.of(*ALONG)
def _(op: Op) -> Any:
    x, dim = op.argument(0, "self"), op.argument(1, "dim", -1)
    if not isinstance(dim, int) or "topk" in str(op.node.target):
        dim = -1
    return op.result(op.across(x, [dim], " runs over the channels"))


@RULES.of(*WINDOWS[1], *WINDOWS[2], *WINDOWS[3])
def _(op: Op) -> Any:
    x = op.argument(0, "self")
    spatial = next(axes for axes, names in WINDOWS.items() if op.name in names)
    return op.result(op.across(x, range(-spatial, 0)))


@RULES.of("glu")
def _(op: Op) -> Value:
    x, dim = op.argument(0, "self"), op.argument(1, "dim", -1)
    if x.labels is None:
        return Value(op.shape)
    value, gate = x.labels.expand(x.shape).chunk(2, dim)
    op.tie(value, gate)
    return op.settled(value)
