"""Rules for operations that move data: the same move is made to the labels.

Reshape and permute, split, join, pad, pick by index. What a rule works with: `trace.Op`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from quantize.compression.pruning.labels import Value, varying
from quantize.compression.pruning.trace import Op, Rules

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

BY_NUMBER = " picks channels by number"

Move = Callable[[torch.Tensor], Any]
RULES = Rules()


def _move(op: Op) -> Move:
    """The operation, as a function of its first operand."""
    target: Any = op.node.target
    rest, kwargs = op.node.args[1:], dict(op.node.kwargs)
    size = list(op.shape)
    if op.name in TO_A_SIZE:
        return lambda index: index.reshape(size)
    if op.name in BROADCASTS:
        return lambda index: index.expand(size)
    return lambda index: target(index, *rest, **kwargs)


def _moved(value: Value, shape: Iterable[int], move: Move) -> Value:
    """A parameter after one more move."""
    assert value.source is not None
    name, moves = value.source
    return Value(tuple(shape), source=(name, (*moves, move)))


def _nodes(op: Op, index: int) -> Any:
    """An argument that is a list of nodes."""
    return op.node.args[index]


@RULES.of(*MOVES)
def _(op: Op) -> Value:
    x = op.argument(0, "self")
    takes_tensors = any(isinstance(given, torch.fx.Node) for given in op.node.args[1:])
    if takes_tensors and op.name not in LIKE_ANOTHER:
        return op.unfollowed(x)
    move = _move(op)
    if x.source:
        return _moved(x, op.shape, move)
    if x.labels is None:
        return op.result(None)
    if op.name == "select":
        _pin_until(op, x)
    return op.settled(move(x.labels.expand(x.shape)), BY_NUMBER)


def _pin_until(op: Op, x: Value) -> None:
    """Pin the channels up to the one that `select` picks: its number must not change."""
    labels = x.labels
    assert labels is not None
    place: Any = op.node.args[2]
    dim = op.argument(1, "dim") % len(x.shape)
    if labels.shape[dim] == 1 or len(varying(labels)) != 1:
        return
    if place >= 0:
        counted = labels.narrow(dim, 0, place + 1)
    else:
        counted = labels.narrow(dim, place, -place)
    op.pin(counted, BY_NUMBER)


@RULES.of(*SPLITS)
def _(op: Op) -> list[Value]:
    x = op.argument(0, "self")
    move = _move(op)
    if x.source:
        parts = enumerate(op.shape)
        return [_moved(x, shape, lambda index, i=i: move(index)[i]) for i, shape in parts]
    if x.labels is None:
        return op.result(None)
    place = 1 if op.name == "unbind" else 2
    dim = op.argument(place, "dim", 0) % len(x.shape)
    labels = list(move(x.labels.expand(x.shape)))
    if x.labels.shape[dim] > 1 and len({part.shape for part in labels}) == 1:
        for part in labels[1:]:  # the parts must stay alike
            op.tie(part, labels[0])
    pairs = zip(op.shape, labels, strict=True)
    return [op.settled(part, BY_NUMBER, shape) for shape, part in pairs]


@RULES.of("cat", "concat", "concatenate", "stack")
def _(op: Op) -> Value:
    values = [op.trace.values[part] for part in _nodes(op, 0)]
    axes = len(op.shape)
    dim = op.argument(1, "dim", 0) % axes
    stacks = op.name == "stack"
    if stacks:
        values = [_with_axis(value, dim) for value in values]
    values = [value for value in values if len(value.shape) == axes]
    if not stacks and not any(dim in varying(value.labels) for value in values):
        return _joined_along(op, values, dim)
    moving = {dim}
    for value in values:
        moving |= varying(value.labels)
    pieces = []
    for value in values:
        size = [length if d in moving else 1 for d, length in enumerate(value.shape)]
        blank = torch.full(size, -1)
        pieces.append(blank if value.labels is None else value.labels.expand(size))
    return op.settled(torch.cat(pieces, dim))


def _with_axis(value: Value, dim: int) -> Value:
    """What `stack` joins: the value with an axis of size 1 before `dim`."""
    labels = None if value.labels is None else value.labels.unsqueeze(dim)
    return Value((*value.shape[:dim], 1, *value.shape[dim:]), labels)


def _joined_along(op: Op, values: list[Value], dim: int) -> Value:
    """Parts joined along an axis without channels: they meet channel by channel, as in a sum."""
    flat = []
    for value in values:
        size = (*value.shape[:dim], 1, *value.shape[dim + 1 :])
        if value.source is None:
            flat.append(Value(size, value.labels))
        else:
            flat.append(_moved(value, size, lambda index: index.narrow(dim, 0, 1)))
    meeting = list(op.shape)
    meeting[dim] = 1
    return op.result(op.met(flat, meeting).labels)


@RULES.of("pad", "constant_pad_nd")
def _(op: Op) -> Value:
    x, amounts = op.argument(0, "self"), op.argument(1, "pad")
    if x.labels is None:
        return Value(op.shape)
    moving = varying(x.labels)
    last = len(x.shape) - 1
    wider = []  # what is added along axes with channels
    for i, amount in enumerate(amounts):
        wider.append(amount if last - i // 2 in moving else 0)
    if not any(wider):  # elements added along the other axes go with their channel
        return op.result(x.labels)
    constant = op.name == "constant_pad_nd"
    if not constant and op.argument(2, "mode", "constant") != "constant":
        return op.unfollowed(x)
    return op.settled(nn.functional.pad(x.labels, wider, value=-1))


@RULES.of("index")
def _(op: Op) -> Value:
    x, indices = op.argument(0, "self"), _nodes(op, 1)
    used = {d for d, index in enumerate(indices) if index is not None}
    if x.labels is None:
        return Value(op.shape)
    if used & varying(x.labels):
        op.pin(x.labels, BY_NUMBER)
        return Value(op.shape)
    first: list[Any] = []  # of each indexed axis: the labels don't change along it
    for index in indices:
        if index is None:
            first.append(slice(None))
        else:
            shape = op.trace.values[index].shape
            first.append(torch.zeros(shape, dtype=torch.long))
    every = x.labels.expand(x.shape)
    return op.settled(every[tuple(first)])


@RULES.of("index_select")
def _(op: Op) -> Value:
    x, dim = op.argument(0, "self"), op.argument(1, "dim")
    if dim % len(x.shape) in varying(x.labels):
        op.pin(x.labels, BY_NUMBER)
        return Value(op.shape)
    return op.result(x.labels)
