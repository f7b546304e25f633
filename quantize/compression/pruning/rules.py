"""Rules: what an operation does to the labels of its inputs, one rule for each family of
operations.

A rule takes the trace, the graph node, the shape of the output (a list of shapes for several
outputs) and a text that names the operation, and returns the output's value. It ties and pins
through `trace.labels`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantize.compression.pruning.labels import Value, varying

if TYPE_CHECKING:
    from quantize.compression.pruning.trace import Trace

MOVES = set(
    "view reshape _unsafe_view view_as reshape_as flatten unflatten transpose permute t "
    "numpy_T mT movedim moveaxis swapaxes "
    "swapdims squeeze unsqueeze expand expand_as broadcast_to repeat tile slice narrow select "
    "flip roll pixel_shuffle "
    "pixel_unshuffle channel_shuffle native_channel_shuffle repeat_interleave diagonal".split()
)
SPLITS = set(
    "split split_with_sizes chunk unbind tensor_split unsafe_chunk unsafe_split "
    "unsafe_split_with_sizes".split()
)
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
ALONG = set(
    "softmax _softmax log_softmax _log_softmax cumsum cumprod sort topk argsort cummax".split()
)  # keep their shape
SHAPED = MOVES | SPLITS  # operations whose arguments may hold sizes that Python computed

Rule = Callable[["Trace", torch.fx.Node, Any, str], Any]
RULES: dict[str, Rule] = {}
SEES_WEIGHTS = set("linear addmm matmul mm bmm embedding conv1d conv2d conv3d".split())
SEES_WEIGHTS |= set("conv_transpose1d conv_transpose2d conv_transpose3d".split())


def rule(*names: str) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


def _linear(
    trace: Trace, x: Value, weight: Value, bias: Value | None, shape: Any, why: str, *, inner: int
) -> Value:
    """x [..., K] times a weight whose dimension `inner` is K."""
    labels, found = trace.labels, trace.labels.weight(weight)
    if found is None or len(weight.shape) != 2:
        trace.weight_is_computed(x.labels, why)
        return Value(shape)
    name, order = found
    last = len(x.shape) - 1
    kept = x.labels
    if varying(kept) - {last}:  # mixes one axis and leaves the labelled one alone
        kept = labels.collapse_all(x, [last], why)
        trace.consume(name, order[inner], None, why)
        labels.pin(
            trace.produce(name, order[1 - inner], why),
            f"{why}: another axis of its input carries channels",
        )
        return labels.settle(shape, kept, why)
    trace.consume(name, order[inner], kept, why)
    out = trace.produce(name, order[1 - inner], why)
    trace.vector(bias, out, len(out), why)
    return Value(tuple(shape), out.view([1] * (len(shape) - 1) + [-1]) if len(out) > 1 else None)


@rule("linear")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    x, weight, bias = (
        trace.argument(node, i, n) for i, n in enumerate(("input", "weight", "bias"))
    )
    return _linear(trace, x, weight, bias, shape, why, inner=1)


@rule("addmm")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    bias, x, weight = (trace.argument(node, i, n) for i, n in enumerate(("input", "mat1", "mat2")))
    return _linear(trace, x, weight, bias, shape, why, inner=0)


@rule("matmul", "mm", "bmm")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    a, b = trace.argument(node, 0, "input"), trace.argument(node, 1, "other")
    labels = trace.labels
    if b.source and len(b.shape) == 2 and not a.source:
        return _linear(trace, a, b, None, shape, why, inner=0)
    if min(len(a.shape), len(b.shape)) < 2 or a.source or b.source:
        for v in (a, b):
            labels.pin(v.labels, f"{why} can't be followed")
            if v.source:
                trace.pin_parameter(v, f"{why} can't be followed")
        return Value(shape)
    sides = []
    for v in (a, b):
        n = len(v.shape)
        whole = varying(v.labels) - {n - 1, n - 2}
        sides.append(Value(v.shape, labels.collapse_all(v, [-1, -2], why) if whole else v.labels))
    if any(varying(s.labels) - {len(s.shape) - 1, len(s.shape) - 2} for s in sides):
        heads = [
            Value(
                (*s.shape[:-2], 1, 1),
                s.labels if varying(s.labels) - {len(s.shape) - 1, len(s.shape) - 2} else None,
            )
            for s in sides
        ]
        for s, h in zip(sides, heads, strict=True):
            if h.labels is None:
                labels.pin(s.labels, why)
        result = labels.elementwise(
            heads, (*shape[:-2], 1, 1), f"{why} mixes it with data that can't shrink"
        )
        return Value(tuple(shape), result.labels)
    left, right = (varying(s.labels) for s in sides)
    inner_a = sides[0].labels.flatten() if left == {len(a.shape) - 1} else None
    inner_b = sides[1].labels.flatten() if right == {len(b.shape) - 2} else None
    if inner_a is not None or inner_b is not None:
        blank = torch.full((a.shape[-1],), -1)
        labels.tie(
            blank if inner_a is None else inner_a, blank if inner_b is None else inner_b, why
        )
    if right == {len(b.shape) - 1} and not left - {len(a.shape) - 1}:
        return Value(tuple(shape), sides[1].labels.view([1] * (len(shape) - 1) + [-1]))
    if left == {len(a.shape) - 2} and not right - {len(b.shape) - 2}:
        return Value(tuple(shape), sides[0].labels.view([1] * (len(shape) - 2) + [-1, 1]))
    for s, dims in ((sides[0], left), (sides[1], right)):
        if dims:
            labels.pin(s.labels, f"{why} can't be followed")
    return Value(shape)


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    x, weight, bias = (
        trace.argument(node, i, n) for i, n in enumerate(("input", "weight", "bias"))
    )
    transposed = "transpose" in str(
        node.target
    )  # (..., output_padding, groups, dilation); else (..., dilation, groups)
    groups = trace.argument(node, 6, "groups", 1)
    labels, found = trace.labels, trace.labels.weight(weight)
    spatial = len(weight.shape) - 2
    channel = len(x.shape) - spatial - 1
    given = labels.collapse_all(x, range(channel + 1, len(x.shape)), why)
    if found is None:
        trace.weight_is_computed(given, why)
        return Value(shape)
    if varying(given) - {channel}:
        labels.pin(given, f"{why} can't be followed")
        return Value(shape)
    name, order = found
    taken = torch.full((x.shape[channel],), -1) if given is None else given.flatten()
    if groups == 1:
        trace.consume(name, order[0 if transposed else 1], taken, why)
        out = trace.produce(name, order[1 if transposed else 0], why)
        together = out
    elif transposed:  # weight [C_in, C_out / groups, ...]: only whole inputs could go
        labels.pin(taken, f"{why}: a grouped transposed convolution")
        return Value(shape)
    else:  # a group of inputs goes with its group of outputs
        out = trace.produce(name, order[0], why)
        together = out.view(groups, -1)
        labels.tie(together, together[:, :1], why)
        labels.tie(taken.view(groups, -1), together[:, :1], f"{why} reads other data too")
    trace.vector(bias, out, len(out), why)
    size = [1] * len(shape)
    size[channel] = len(out)
    return Value(tuple(shape), out.view(size) if len(out) > 1 else None)


@rule("embedding")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    found = trace.labels.weight(trace.argument(node, 0, "weight"))
    if found is None:
        trace.weight_is_computed(None, why)
        return Value(shape)
    out = trace.produce(found[0], found[1][1], why)
    return Value(tuple(shape), out.view([1] * (len(shape) - 1) + [-1]) if len(out) > 1 else None)


# Norms and attention.


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Any:
    x = trace.argument(node, 0, "input")
    given = trace.labels.collapse_all(x, range(2, len(x.shape)), why)
    for i, name in enumerate(("weight", "bias", "running_mean", "running_var"), 1):
        trace.vector(trace.argument(node, i, name), given, x.shape[1], why)
    return trace.labels.settle(x.shape, given, why)


@rule("prelu")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    x, weight = trace.argument(node, 0, "self"), trace.argument(node, 1, "weight")
    if weight.shape in ((), (1,)):
        return Value(tuple(shape), x.labels)
    given = trace.labels.collapse_all(x, [d for d in range(len(x.shape)) if d != 1], why)
    trace.vector(weight, given, x.shape[1], why)
    return trace.labels.settle(shape, given, why)


@rule("group_norm")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    x, groups = trace.argument(node, 0, "input"), trace.argument(node, 1, "num_groups")
    given = trace.labels.collapse_all(x, range(2, len(x.shape)), why)
    if given is not None and given.shape[1] > 1:
        together = given.reshape(groups, -1)
        if groups == 1:
            trace.labels.pin(given, f"{why} averages over the channels")
        else:
            trace.labels.tie(together, together[:, :1], why)
    for i, name in enumerate(("weight", "bias"), 2):
        trace.vector(trace.argument(node, i, name), given, x.shape[1], why)
    return trace.labels.settle(shape, given, why)


@rule("layer_norm", "rms_norm")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    x, normalized = trace.argument(node, 0, "input"), trace.argument(node, 1, "normalized_shape")
    dims = range(len(shape) - len(normalized), len(shape))
    return trace.labels.settle(
        shape, trace.labels.collapse_all(x, dims, f"{why} averages over the channels"), why
    )


@rule("scaled_dot_product_attention")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    labels = trace.labels
    parts = [trace.argument(node, i, n) for i, n in enumerate(("query", "key", "value"))]
    mask = trace.argument(node, 3, "attn_mask")
    heads = []
    for part in parts:
        given = labels.collapse_all(part, [-1, -2], f"{why} needs whole heads")
        if given is not None and part.shape[-3] != shape[-3]:  # grouped queries
            given = (
                given.repeat_interleave(shape[-3] // part.shape[-3], -3)
                if given.shape[-3] > 1
                else given
            )
        heads.append(Value((*shape[:-2], 1, 1), given))
    if isinstance(mask, Value):
        heads.append(
            Value((*mask.shape[:-2], 1, 1), labels.collapse_all(mask, [-1, -2], why), None)
        )
    result = labels.elementwise(
        heads, (*shape[:-2], 1, 1), f"{why} mixes it with data that can't shrink"
    )
    return Value(tuple(shape), result.labels)


def _name(node: torch.fx.Node) -> str:
    target: Any = node.target
    return target.overloadpacket.__name__


def _nodes(node: torch.fx.Node, index: int) -> Any:
    """An argument that is a list of nodes."""
    return node.args[index]


# Moves: the same move made to the labels.


def _mover(node: torch.fx.Node) -> Callable[[torch.Tensor], Any]:
    target: Any = node.target
    rest, kwargs = node.args[1:], dict(node.kwargs)
    name = _name(node)
    if name in ("view", "_unsafe_view", "view_as", "reshape_as", "reshape", "flatten", "unflatten"):
        size = list(node.meta["val"].shape)
        return lambda index: index.reshape(size)
    if name in ("expand_as", "expand", "broadcast_to"):
        size = list(node.meta["val"].shape)
        return lambda index: index.expand(size)
    return lambda index: target(index, *rest, **kwargs)


@rule(*MOVES)
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    x = trace.argument(node, 0, "self")
    if any(isinstance(a, torch.fx.Node) for a in node.args[1:]) and str(node.target).split(".")[
        1
    ] not in (
        "view_as",
        "reshape_as",
        "expand_as",
    ):
        trace.labels.pin(x.labels, f"{why} can't be followed")
        return Value(shape)
    move = _mover(node)
    if x.source:
        return Value(tuple(shape), source=(x.source[0], (*x.source[1], move)))
    if x.labels is None:
        return Value(tuple(shape))
    name = _name(node)
    if name == "select":
        place: Any = node.args[2]
        dim = trace.argument(node, 1, "dim") % len(x.shape)
        if x.labels.shape[dim] > 1 and len(varying(x.labels)) == 1:
            before = (
                x.labels.narrow(dim, 0, place + 1)
                if place >= 0
                else x.labels.narrow(dim, place, -place)
            )
            trace.labels.pin(before, f"{why} picks channels by number")
    return trace.labels.settle(
        shape, move(x.labels.expand(x.shape)), f"{why} picks channels by number"
    )


@rule(*SPLITS)
def _(trace: Trace, node: torch.fx.Node, shapes: Any, why: str) -> list[Value]:
    x = trace.argument(node, 0, "self")
    move = _mover(node)
    if x.source:
        return [
            Value(s, source=(x.source[0], (*x.source[1], lambda index, i=i: move(index)[i])))
            for i, s in enumerate(shapes)
        ]
    if x.labels is None:
        return [Value(s) for s in shapes]
    name = _name(node)
    dim = trace.argument(node, 1 if name == "unbind" else 2, "dim", 0) % len(x.shape)
    parts = list(move(x.labels.expand(x.shape)))
    if x.labels.shape[dim] > 1 and len({p.shape for p in parts}) == 1:
        for part in parts[1:]:  # the parts must stay alike
            trace.labels.tie(part, parts[0], why)
    return [
        trace.labels.settle(s, p, f"{why} picks channels by number")
        for s, p in zip(shapes, parts, strict=True)
    ]


@rule("cat", "concat", "concatenate", "stack")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    labels, values = trace.labels, [trace.values[n] for n in _nodes(node, 0)]
    dim = trace.argument(node, 1, "dim", 0) % len(shape)
    if _name(node) == "stack":
        values = [
            Value(
                (*v.shape[:dim], 1, *v.shape[dim:]),
                None if v.labels is None else v.labels.unsqueeze(dim),
            )
            for v in values
        ]
    values = [v for v in values if len(v.shape) == len(shape)]
    if not any(dim in varying(v.labels) for v in values) and _name(node) != "stack":
        flat = [
            Value(
                (*v.shape[:dim], 1, *v.shape[dim + 1 :]),
                v.labels,
                v.source and (v.source[0], (*v.source[1], _first(dim))),
            )
            for v in values
        ]
        result = labels.elementwise(flat, [1 if d == dim else s for d, s in enumerate(shape)], why)
        return Value(tuple(shape), result.labels)
    moving = set().union(*(varying(v.labels) for v in values)) | {dim}
    pieces = []
    for v in values:
        size = [s if d in moving else 1 for d, s in enumerate(v.shape)]
        pieces.append(torch.full(size, -1) if v.labels is None else v.labels.expand(size))
    return labels.settle(shape, torch.cat(pieces, dim), why)


def _first(dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda index: index.narrow(dim, 0, 1)


@rule("pad", "constant_pad_nd")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    x, amounts = trace.argument(node, 0, "self"), trace.argument(node, 1, "pad")
    if x.labels is None:
        return Value(shape)
    along = [len(x.shape) - 1 - i // 2 for i in range(len(amounts))]
    wider = [a if d in varying(x.labels) else 0 for d, a in zip(along, amounts, strict=True)]
    if not any(wider):  # elements added along the other axes go with their channel
        return Value(tuple(shape), x.labels)
    constant = _name(node) == "constant_pad_nd"
    if not constant and trace.argument(node, 2, "mode", "constant") != "constant":
        trace.labels.pin(x.labels, f"{why} can't be followed")
        return Value(shape)
    return trace.labels.settle(shape, nn.functional.pad(x.labels, wider, value=-1), why)


@rule("index")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    x, indices = trace.argument(node, 0, "self"), _nodes(node, 1)
    used = {d for d, i in enumerate(indices) if i is not None}
    if x.labels is None:
        return Value(shape)
    if used & varying(x.labels):
        trace.labels.pin(x.labels, f"{why} picks channels by number")
        return Value(shape)
    zeros = tuple(
        slice(None) if i is None else torch.zeros(trace.values[i].shape, dtype=torch.long)
        for i in indices
    )
    return trace.labels.settle(shape, x.labels.expand(x.shape)[zeros], why)


@rule("index_select")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    x, dim = trace.argument(node, 0, "self"), trace.argument(node, 1, "dim")
    if dim % len(x.shape) in varying(x.labels):
        trace.labels.pin(x.labels, f"{why} picks channels by number")
        return Value(shape)
    return Value(tuple(shape), x.labels)


# Reductions, windows, softmax.


@rule(*REDUCTIONS)
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Any:
    x = trace.argument(node, 0, "self")
    place = 2 if "norm" in str(node.target) else 1
    dims = trace.argument(node, place, "dim")
    if str(node.target).endswith(".other"):
        return trace.labels.elementwise(trace.tensors(node.args), shape, why)  # max(a, b)
    dims = (
        list(range(len(x.shape)))
        if dims is None
        else [dims]
        if isinstance(dims, int)
        else list(dims)
    )
    dims = [d % len(x.shape) for d in dims]
    given = trace.labels.collapse_all(x, dims, f"{why} runs over the channels")
    outs = shape if isinstance(shape, list) else [shape]
    if given is not None and len(outs[0]) != len(x.shape):
        given = given.reshape([s for d, s in enumerate(given.shape) if d not in dims])
    results = [Value(tuple(s), given) for s in outs]
    return results if isinstance(shape, list) else results[0]


@rule(*ALONG)
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Any:
    x, dim = trace.argument(node, 0, "self"), trace.argument(node, 1, "dim", -1)
    dim = dim if isinstance(dim, int) and "topk" not in str(node.target) else -1
    given = trace.labels.collapse_all(x, [dim], f"{why} runs over the channels")
    return (
        [Value(s, given) for s in shape] if isinstance(shape, list) else Value(tuple(shape), given)
    )


@rule(*WINDOWS[1], *WINDOWS[2], *WINDOWS[3])
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Any:
    x = trace.argument(node, 0, "self")
    name = _name(node)
    spatial = next(k for k, names in WINDOWS.items() if name in names)
    given = trace.labels.collapse_all(x, range(-spatial, 0), why)
    return (
        [Value(s, given) for s in shape] if isinstance(shape, list) else Value(tuple(shape), given)
    )


@rule("glu")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    x, dim = trace.argument(node, 0, "self"), trace.argument(node, 1, "dim", -1)
    if x.labels is None:
        return Value(shape)
    a, b = x.labels.expand(x.shape).chunk(2, dim)
    trace.labels.tie(a, b, why)
    return trace.labels.settle(shape, a, why)
