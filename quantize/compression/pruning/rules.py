"""Rules for operations that compute: products, convolutions, norms, attention, reductions.

What a rule takes and gives: see `trace.Rule`. Operations that only move data: moves.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from quantize.compression.pruning.labels import Value, varying
from quantize.compression.pruning.trace import Rules, Trace, operation

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


def _arguments(trace: Trace, node: torch.fx.Node, *names: str) -> list[Any]:
    """The first arguments of the node, by the names they may be given by."""
    return [trace.argument(node, index, name) for index, name in enumerate(names)]


def _along(shape: Sequence[int], dim: int, labels: torch.Tensor) -> Value:
    """A value of this shape whose labels change along `dim` (negative: from the end) alone."""
    if len(labels) == 1:
        return Value(tuple(shape))
    size = [1] * len(shape)
    size[dim] = len(labels)
    return Value(tuple(shape), labels.view(size))


def _alike(shape: Any, labels: torch.Tensor | None) -> Any:
    """A value of this shape with these labels, or one for each of several shapes."""
    if isinstance(shape, list):
        return [Value(one, labels) for one in shape]
    return Value(tuple(shape), labels)


# Products.


def _linear(
    trace: Trace, x: Value, weight: Value, bias: Value | None, shape: Any, why: str, *, inner: int
) -> Value:
    """x [..., K] times a weight whose dimension `inner` is K."""
    labels, parameter = trace.labels, trace.labels.weight(weight)
    if parameter is None or len(weight.shape) != 2:
        trace.weight_is_computed(x.labels, why)
        return Value(shape)
    name, order = parameter
    last = len(x.shape) - 1
    read = x.labels
    if varying(read) - {last}:  # mixes one axis and leaves the labelled one alone
        read = labels.collapse_all(x, [last], why)
        trace.consume(name, order[inner], None, why)
        out = trace.produce(name, order[1 - inner], why)
        labels.pin(out, f"{why}: another axis of its input carries channels")
        return labels.settle(shape, read, why)
    trace.consume(name, order[inner], read, why)
    out = trace.produce(name, order[1 - inner], why)
    trace.vector(bias, out, len(out), why)
    return _along(shape, -1, out)


@RULES.of("linear")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    x, weight, bias = _arguments(trace, node, "input", "weight", "bias")
    return _linear(trace, x, weight, bias, shape, why, inner=1)


@RULES.of("addmm")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    bias, x, weight = _arguments(trace, node, "input", "mat1", "mat2")
    return _linear(trace, x, weight, bias, shape, why, inner=0)


@RULES.of("matmul", "mm", "bmm")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    a, b = _arguments(trace, node, "input", "other")
    if b.source and len(b.shape) == 2 and not a.source:
        return _linear(trace, a, b, None, shape, why, inner=0)
    if min(len(a.shape), len(b.shape)) < 2 or a.source or b.source:
        for operand in (a, b):
            trace.unfollowed(operand, shape, why)
            if operand.source:
                trace.pin_parameter(operand, f"{why} can't be followed")
        return Value(shape)
    left, right = _in_whole_heads(trace, a, why), _in_whole_heads(trace, b, why)
    if _batched(left) or _batched(right):
        return _by_heads(trace, left, right, shape, why)
    return _matrices(trace, left, right, shape, why)


def _batched(value: Value) -> set[int]:
    """Axes in front of the matrix along which the labels change: heads."""
    axes = len(value.shape)
    return varying(value.labels) - {axes - 1, axes - 2}


def _in_whole_heads(trace: Trace, value: Value, why: str) -> Value:
    """With channels in front of the matrix, what changes inside of it goes together."""
    if not _batched(value):
        return value
    return Value(value.shape, trace.labels.collapse_all(value, [-1, -2], why))


def _by_heads(trace: Trace, left: Value, right: Value, shape: Any, why: str) -> Value:
    """A batch of products: the heads of both operands go together."""
    heads = []
    for operand in (left, right):
        batched = _batched(operand)
        if not batched:
            trace.labels.pin(operand.labels, why)
        heads.append(Value((*operand.shape[:-2], 1, 1), operand.labels if batched else None))
    mixed = f"{why} mixes it with data that can't shrink"
    met = trace.labels.elementwise(heads, (*shape[:-2], 1, 1), mixed)
    return Value(tuple(shape), met.labels)


def _matrices(trace: Trace, left: Value, right: Value, shape: Any, why: str) -> Value:
    """A product of two computed matrices, [..., M, K] and [..., K, N]."""
    rows, columns = len(left.shape) - 2, len(right.shape) - 1
    in_left, in_right = varying(left.labels), varying(right.labels)
    in_sum = in_left == {rows + 1}, in_right == {columns - 1}
    if any(in_sum):
        size = left.shape[-1]
        trace.labels.tie(_flat(left, in_sum[0], size), _flat(right, in_sum[1], size), why)
    if right.labels is not None and in_right == {columns} and not in_left - {rows + 1}:
        return _along(shape, -1, right.labels.flatten())
    if left.labels is not None and in_left == {rows} and not in_right - {columns - 1}:
        return _along(shape, -2, left.labels.flatten())
    for operand in (left, right):
        if varying(operand.labels):
            trace.unfollowed(operand, shape, why)
    return Value(shape)


def _flat(value: Value, labelled: bool, size: int) -> torch.Tensor:
    """The labels along the one axis that has them, or as many blanks."""
    if value.labels is None or not labelled:
        return torch.full((size,), -1)
    return value.labels.flatten()


@RULES.of("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    x, weight, bias = _arguments(trace, node, "input", "weight", "bias")
    # (..., output_padding, groups, dilation) if transposed; else (..., dilation, groups)
    transposed = "transpose" in operation(node)
    groups = trace.argument(node, 6, "groups", 1)
    labels, parameter = trace.labels, trace.labels.weight(weight)
    spatial = len(weight.shape) - 2
    channel = len(x.shape) - spatial - 1
    read = labels.collapse_all(x, range(channel + 1, len(x.shape)), why)
    if parameter is None:
        trace.weight_is_computed(read, why)
        return Value(shape)
    if varying(read) - {channel}:
        return trace.unfollowed(Value(x.shape, read), shape, why)
    name, order = parameter
    taken = torch.full((x.shape[channel],), -1) if read is None else read.flatten()
    inputs, outputs = (0, 1) if transposed else (1, 0)
    if groups == 1:
        trace.consume(name, order[inputs], taken, why)
        out = trace.produce(name, order[outputs], why)
    elif transposed:  # weight [C_in, C_out / groups, ...]: only whole inputs could go
        labels.pin(taken, f"{why}: a grouped transposed convolution")
        return Value(shape)
    else:  # a group of inputs goes with its group of outputs
        out = trace.produce(name, order[outputs], why)
        together = out.view(groups, -1)
        labels.tie(together, together[:, :1], why)
        labels.tie(taken.view(groups, -1), together[:, :1], f"{why} reads other data too")
    trace.vector(bias, out, len(out), why)
    return _along(shape, channel, out)


@RULES.of("embedding")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    parameter = trace.labels.weight(trace.argument(node, 0, "weight"))
    if parameter is None:
        trace.weight_is_computed(None, why)
        return Value(shape)
    name, order = parameter
    return _along(shape, -1, trace.produce(name, order[1], why))


# Norms and attention.


@RULES.of("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Any:
    names = ("input", "weight", "bias", "running_mean", "running_var")
    x, *vectors = _arguments(trace, node, *names)
    labels = trace.labels.collapse_all(x, range(2, len(x.shape)), why)
    for vector in vectors:
        trace.vector(vector, labels, x.shape[1], why)
    return trace.labels.settle(x.shape, labels, why)


@RULES.of("prelu")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    x, weight = _arguments(trace, node, "self", "weight")
    if weight.shape in ((), (1,)):
        return Value(tuple(shape), x.labels)
    others = [dim for dim in range(len(x.shape)) if dim != 1]
    labels = trace.labels.collapse_all(x, others, why)
    trace.vector(weight, labels, x.shape[1], why)
    return trace.labels.settle(shape, labels, why)


@RULES.of("group_norm")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    x, groups, weight, bias = _arguments(trace, node, "input", "num_groups", "weight", "bias")
    labels = trace.labels.collapse_all(x, range(2, len(x.shape)), why)
    if labels is not None and labels.shape[1] > 1:
        together = labels.reshape(groups, -1)
        if groups == 1:
            trace.labels.pin(labels, f"{why} averages over the channels")
        else:
            trace.labels.tie(together, together[:, :1], why)
    for vector in (weight, bias):
        trace.vector(vector, labels, x.shape[1], why)
    return trace.labels.settle(shape, labels, why)


@RULES.of("layer_norm", "rms_norm")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    x, normalized = _arguments(trace, node, "input", "normalized_shape")
    dims = range(len(shape) - len(normalized), len(shape))
    labels = trace.labels.collapse_all(x, dims, f"{why} averages over the channels")
    return trace.labels.settle(shape, labels, why)


@RULES.of("scaled_dot_product_attention")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    *parts, mask = _arguments(trace, node, "query", "key", "value", "attn_mask")
    heads = []
    for part in parts:
        labels = trace.labels.collapse_all(part, [-1, -2], f"{why} needs whole heads")
        grouped = part.shape[-3] != shape[-3]  # several queries share a key and a value
        if grouped and labels is not None and labels.shape[-3] > 1:
            labels = labels.repeat_interleave(shape[-3] // part.shape[-3], -3)
        heads.append(Value((*shape[:-2], 1, 1), labels))
    if isinstance(mask, Value):
        labels = trace.labels.collapse_all(mask, [-1, -2], why)
        heads.append(Value((*mask.shape[:-2], 1, 1), labels))
    mixed = f"{why} mixes it with data that can't shrink"
    met = trace.labels.elementwise(heads, (*shape[:-2], 1, 1), mixed)
    return Value(tuple(shape), met.labels)


# Reductions, windows, softmax.


@RULES.of(*REDUCTIONS)
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Any:
    x = trace.argument(node, 0, "self")
    if str(node.target).endswith(".other"):
        return trace.labels.elementwise(trace.tensors(node.args), shape, why)  # max(a, b)
    place = 2 if "norm" in str(node.target) else 1
    dims = trace.argument(node, place, "dim")
    dims = range(len(x.shape)) if dims is None else dims
    dims = [dims] if isinstance(dims, int) else dims
    dims = [dim % len(x.shape) for dim in dims]
    labels = trace.labels.collapse_all(x, dims, f"{why} runs over the channels")
    one = shape[0] if isinstance(shape, list) else shape
    if labels is not None and len(one) != len(x.shape):
        kept = [size for dim, size in enumerate(labels.shape) if dim not in dims]
        labels = labels.reshape(kept)
    return _alike(shape, labels)


@RULES.of(*ALONG)
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Any:
    x, dim = trace.argument(node, 0, "self"), trace.argument(node, 1, "dim", -1)
    dim = dim if isinstance(dim, int) and "topk" not in str(node.target) else -1
    labels = trace.labels.collapse_all(x, [dim], f"{why} runs over the channels")
    return _alike(shape, labels)


@RULES.of(*WINDOWS[1], *WINDOWS[2], *WINDOWS[3])
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Any:
    x, name = trace.argument(node, 0, "self"), operation(node)
    spatial = next(axes for axes, names in WINDOWS.items() if name in names)
    labels = trace.labels.collapse_all(x, range(-spatial, 0), why)
    return _alike(shape, labels)


@RULES.of("glu")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    x, dim = trace.argument(node, 0, "self"), trace.argument(node, 1, "dim", -1)
    if x.labels is None:
        return Value(shape)
    value, gate = x.labels.expand(x.shape).chunk(2, dim)
    trace.labels.tie(value, gate, why)
    return trace.labels.settle(shape, value, why)
