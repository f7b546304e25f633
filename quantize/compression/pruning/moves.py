"""Rules for operations that move data: the same move is made to the labels.

Reshape and permute, split, join, pad, pick by index. What a rule takes and gives: see `trace.Rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from quantize.compression.pruning.labels import Value, varying
from quantize.compression.pruning.trace import Rules, Trace, operation

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
SHAPED = MOVES | SPLITS  # operations whose arguments may hold sizes that Python computed
TO_A_SIZE = set("view _unsafe_view view_as reshape_as reshape flatten unflatten".split())
BROADCASTS = set("expand_as expand broadcast_to".split())
LIKE_ANOTHER = set("view_as reshape_as expand_as".split())  # take a tensor for its shape alone

Move = Callable[[torch.Tensor], Any]
RULES = Rules()


def _move(node: torch.fx.Node) -> Move:
    """The operation of the node, as a function of its first operand."""
    target: Any = node.target
    rest, kwargs = node.args[1:], dict(node.kwargs)
    name = operation(node)
    if name in TO_A_SIZE:
        size = list(node.meta["val"].shape)
        return lambda index: index.reshape(size)
    if name in BROADCASTS:
        size = list(node.meta["val"].shape)
        return lambda index: index.expand(size)
    return lambda index: target(index, *rest, **kwargs)


def _moved(value: Value, shape: Iterable[int], move: Move) -> Value:
    """A parameter after one more move."""
    assert value.source is not None
    name, moves = value.source
    return Value(tuple(shape), source=(name, (*moves, move)))


def _nodes(node: torch.fx.Node, index: int) -> Any:
    """An argument that is a list of nodes."""
    return node.args[index]


@RULES.of(*MOVES)
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    x = trace.argument(node, 0, "self")
    name = operation(node)
    takes_tensors = any(isinstance(argument, torch.fx.Node) for argument in node.args[1:])
    if takes_tensors and name not in LIKE_ANOTHER:
        return trace.unfollowed(x, shape, why)
    move = _move(node)
    if x.source:
        return _moved(x, shape, move)
    if x.labels is None:
        return Value(tuple(shape))
    if name == "select":
        _pin_until(trace, node, x, why)
    moved = move(x.labels.expand(x.shape))
    return trace.labels.settle(shape, moved, f"{why} picks channels by number")


def _pin_until(trace: Trace, node: torch.fx.Node, x: Value, why: str) -> None:
    """Pin the channels up to the one that `select` picks: its number must not change."""
    labels = x.labels
    assert labels is not None
    place: Any = node.args[2]
    dim = trace.argument(node, 1, "dim") % len(x.shape)
    if labels.shape[dim] == 1 or len(varying(labels)) != 1:
        return
    if place >= 0:
        counted = labels.narrow(dim, 0, place + 1)
    else:
        counted = labels.narrow(dim, place, -place)
    trace.labels.pin(counted, f"{why} picks channels by number")


@RULES.of(*SPLITS)
def _(trace: Trace, node: torch.fx.Node, shapes: Any, why: str) -> list[Value]:
    x = trace.argument(node, 0, "self")
    move = _move(node)
    if x.source:
        return [
            _moved(x, shape, lambda index, i=i: move(index)[i]) for i, shape in enumerate(shapes)
        ]
    if x.labels is None:
        return [Value(shape) for shape in shapes]
    place = 1 if operation(node) == "unbind" else 2
    dim = trace.argument(node, place, "dim", 0) % len(x.shape)
    parts = list(move(x.labels.expand(x.shape)))
    if x.labels.shape[dim] > 1 and len({part.shape for part in parts}) == 1:
        for part in parts[1:]:  # the parts must stay alike
            trace.labels.tie(part, parts[0], why)
    return [
        trace.labels.settle(shape, part, f"{why} picks channels by number")
        for shape, part in zip(shapes, parts, strict=True)
    ]


@RULES.of("cat", "concat", "concatenate", "stack")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    values = [trace.values[part] for part in _nodes(node, 0)]
    dim = trace.argument(node, 1, "dim", 0) % len(shape)
    stacks = operation(node) == "stack"
    if stacks:
        values = [_with_axis(value, dim) for value in values]
    values = [value for value in values if len(value.shape) == len(shape)]
    if not stacks and not any(dim in varying(value.labels) for value in values):
        return _joined_along(trace, values, dim, shape, why)
    moving = {dim}
    for value in values:
        moving |= varying(value.labels)
    pieces = []
    for value in values:
        size = [length if d in moving else 1 for d, length in enumerate(value.shape)]
        labels = value.labels
        pieces.append(torch.full(size, -1) if labels is None else labels.expand(size))
    return trace.labels.settle(shape, torch.cat(pieces, dim), why)


def _with_axis(value: Value, dim: int) -> Value:
    """What `stack` joins: the value with an axis of size 1 before `dim`."""
    labels = None if value.labels is None else value.labels.unsqueeze(dim)
    return Value((*value.shape[:dim], 1, *value.shape[dim:]), labels)


def _joined_along(trace: Trace, values: list[Value], dim: int, shape: Any, why: str) -> Value:
    """Parts joined along an axis without channels: they meet channel by channel, as in a sum."""
    flat = []
    for value in values:
        size = (*value.shape[:dim], 1, *value.shape[dim + 1 :])
        if value.source is None:
            flat.append(Value(size, value.labels))
        else:
            flat.append(_moved(value, size, lambda index: index.narrow(dim, 0, 1)))
    meeting = [1 if d == dim else length for d, length in enumerate(shape)]
    met = trace.labels.elementwise(flat, meeting, why)
    return Value(tuple(shape), met.labels)


@RULES.of("pad", "constant_pad_nd")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    x, amounts = trace.argument(node, 0, "self"), trace.argument(node, 1, "pad")
    if x.labels is None:
        return Value(shape)
    along = [len(x.shape) - 1 - i // 2 for i in range(len(amounts))]
    wider = [a if d in varying(x.labels) else 0 for d, a in zip(along, amounts, strict=True)]
    if not any(wider):  # elements added along the other axes go with their channel
        return Value(tuple(shape), x.labels)
    constant = operation(node) == "constant_pad_nd"
    if not constant and trace.argument(node, 2, "mode", "constant") != "constant":
        return trace.unfollowed(x, shape, why)
    return trace.labels.settle(shape, nn.functional.pad(x.labels, wider, value=-1), why)


@RULES.of("index")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    x, indices = trace.argument(node, 0, "self"), _nodes(node, 1)
    used = {d for d, index in enumerate(indices) if index is not None}
    if x.labels is None:
        return Value(shape)
    if used & varying(x.labels):
        trace.labels.pin(x.labels, f"{why} picks channels by number")
        return Value(shape)
    first: list[Any] = []  # of each indexed axis: the labels don't change along it
    for index in indices:
        if index is None:
            first.append(slice(None))
        else:
            first.append(torch.zeros(trace.values[index].shape, dtype=torch.long))
    return trace.labels.settle(shape, x.labels.expand(x.shape)[tuple(first)], why)


@RULES.of("index_select")
def _(trace: Trace, node: torch.fx.Node, shape: Any, why: str) -> Value:
    x, dim = trace.argument(node, 0, "self"), trace.argument(node, 1, "dim")
    if dim % len(x.shape) in varying(x.labels):
        trace.labels.pin(x.labels, f"{why} picks channels by number")
        return Value(shape)
    return Value(tuple(shape), x.labels)
