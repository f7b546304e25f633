"""A module of int8 convolutions as a program that runs in one native call.

`trace` reads the module's forward (torch.fx) where it is made of int8 convolutions, activations,
additions of two results and max pooling alone. An addition and an activation are done while the
convolution before them stores its results; the ranges of samples are noted there too. Between the
steps everything is float32 with the channels last, and each number is computed as by the modules
one after the other: the bits are the same, so the module's own forward can run in a program's place
at any time.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from quantize import surgery
from quantize.native import conv
from quantize.native.conv import UNLIMITED, Geometry, Limits
from quantize.nn.int8_conv import Int8Conv

LEAVES = (Int8Conv, nn.Identity, nn.Dropout, nn.ReLU, nn.ReLU6, nn.MaxPool2d)
_RELU, _RELU6 = (0.0, math.inf), (0.0, 6.0)
_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_ACTIVATIONS: dict[Any, Limits] = {
    **dict.fromkeys((torch.relu, torch.relu_, F.relu, "relu", "relu_"), _RELU),
    F.relu6: _RELU6,
}
SOURCE = -1  # the number of the module's input among the values


@dataclass(frozen=True)
class Op:
    """One operation. Values are numbered: -1 is the input, and each operation gives the next one.

    Args:
        module: an Int8Conv or a max pooling.
        x: the value that it reads.
        limits: of its results.
        other: a value that is added to them then, or None.
        last_limits: of the sums.
    """

    module: Any
    x: int
    limits: Limits = UNLIMITED
    other: int | None = None
    last_limits: Limits = UNLIMITED

    @property
    def reads(self) -> list[int]:
        return [self.x] if self.other is None else [self.x, self.other]

    @property
    def kind(self) -> int:
        """As in `native.conv`."""
        if not isinstance(self.module, Int8Conv):
            return conv.LARGEST
        depthwise = self.module.geometry.depthwise(self.module.packed)
        return conv.DEPTHWISE if depthwise else conv.CONVOLUTION

    @property
    def kernel(self) -> tuple[int, ...]:
        if isinstance(self.module, Int8Conv):
            return self.module.kernel_size
        return _pair(self.module.kernel_size)

    @property
    def geometry(self) -> Geometry:
        if isinstance(self.module, Int8Conv):
            return self.module.geometry
        pool = self.module
        pads = _pair(pool.padding)
        return Geometry(_pair(pool.stride), _pair(pool.dilation), pads, pads)

    def needs_range(self) -> bool:
        """Does it ask for the range of each sample of x?"""
        return self.kind == conv.CONVOLUTION and not self.geometry.pointwise(self.kernel)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


class Unfit(Exception):
    """A forward that is no program."""


# ------------------------------------------------------------------------------------------------
# from a forward


class _Call(nn.Module):
    """A call with one argument: the forward inside has its defaults for all others."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Any) -> Any:
        return self.inside(x)


class _Tracer(fx.Tracer):
    """Goes into all modules but LEAVES. channels: of the input, which a forward may ask for."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LEAVES)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def channels_of(self, node: fx.Node) -> int:
        """Of what a node gives."""
        if node.op == "placeholder":
            return self.channels
        found = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(found, Int8Conv):
            return found.out_channels
        known = found is not None or node.target in _ADDS or node.target in _ACTIVATIONS
        first = node.args[0] if known else None
        if not isinstance(first, fx.Node):
            raise Unfit("a forward that asks for a size")
        return self.channels_of(first)


class _Value(fx.Proxy):
    """What stands for a tensor: its channels are known, its other sizes aren't."""

    @property
    def shape(self) -> _Shape:
        tracer: Any = self.tracer
        return _Shape(tracer.channels_of(self.node))


@dataclass(frozen=True)
class _Shape:
    channels: int

    def __getitem__(self, dimension: int) -> int:
        if dimension != 1:
            raise Unfit("a forward that asks for a size")
        return self.channels


def trace(module: nn.Module) -> list[Op] | None:
    """The operations of a module's forward, whose last one gives its result; None where it does
    anything else.
    """
    for inside in module.modules():
        if (inside._parameters or inside._buffers) and not isinstance(inside, LEAVES):
            return None
    # the copy's forward may keep what it is traced with; tensors are not copied
    memo = {id(t): t for t in (*module.parameters(), *module.buffers())}
    try:
        copied = surgery.deepcopy(module, memo)
        channels = next(m.in_channels for m in module.modules() if isinstance(m, Int8Conv))
        with surgery.without_logs():
            graph = _Tracer(channels).trace(_Call(copied))
        ops = _Reading(_Call(module), graph).ops
        reads = {op.module.in_channels for op in ops if op.x == SOURCE and op.kind != conv.LARGEST}
        return ops if reads == {channels} else None
    except Exception:  # a forward that reads values, or whatever else a proxy can't answer
        return None


class _Reading:
    """Operations of a graph. module: whose submodules the graph names."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module, self.ops = module, list[Op]()
        self.values: dict[fx.Node, int] = {}  # by the node that gives it
        self.same: dict[fx.Node, fx.Node] = {}  # nodes that give what another one gave
        for node in graph.nodes:
            if node.op == "call_module" and self._passes_on(node):
                self.same[node] = self._source(node)
        for node in graph.nodes:
            if node not in self.same:
                getattr(self, f"_{node.op}")(node)

    def _passes_on(self, node: fx.Node) -> bool:
        found = self.module.get_submodule(str(node.target))
        asleep = type(found) is nn.Dropout and not found.training
        return type(found) is nn.Identity or asleep

    def _source(self, node: fx.Node, at: int = 0) -> fx.Node:
        """The node that gave an argument of this one. Raises KeyError for one that gives none."""
        argument: Any = node.args[at]
        source: Any = self.same.get(argument, argument)
        return source

    def _readers(self, node: fx.Node) -> set[fx.Node]:
        """Nodes that read what `node` gives."""
        found = set(node.users)
        for other, source in self.same.items():
            if source is node:
                found = (found - {other}) | set(other.users)
        return found - self.same.keys()

    def _placeholder(self, node: fx.Node) -> None:
        if node.users:
            if self.values:
                raise Unfit("a second input")
            self.values[node] = SOURCE

    def _call_module(self, node: fx.Node) -> None:
        found: Any = self.module.get_submodule(str(node.target))
        x, kind = self.values[self._source(node)], type(found)
        if kind is nn.ReLU or kind is nn.ReLU6:
            self._activate(node, _RELU if kind is nn.ReLU else _RELU6)
        elif kind is Int8Conv and found.padding_mode == "zeros" and not found.floats:
            self._append(node, Op(found, x, found.limits))
        elif kind is nn.MaxPool2d and not (found.ceil_mode or found.return_indices):
            self._append(node, Op(found, x))
        else:
            raise Unfit(f"a {kind.__name__}")

    def _call_function(self, node: fx.Node) -> None:
        options = node.kwargs.keys() - {"inplace"}
        if options:
            raise Unfit(f"options {options}")
        if node.target in _ADDS and len(node.args) == 2:
            self._add(node)
        elif node.target in _ACTIVATIONS and len(node.args) == 1:
            self._activate(node, _ACTIVATIONS[node.target])
        else:
            raise Unfit(f"a call of {node.target}")

    _call_method = _call_function

    def _get_attr(self, node: fx.Node) -> None:
        raise Unfit("a tensor of the module")

    def _output(self, node: fx.Node) -> None:
        source = self._source(node)
        if self.values[source] != len(self.ops) - 1 or len(self._readers(source)) > 1:
            raise Unfit("a result that is read again")

    def _append(self, node: fx.Node, op: Op) -> None:
        self.values[node] = len(self.ops)
        self.ops.append(op)

    def _activate(self, node: fx.Node, limits: Limits) -> None:
        """Cut off the results of an operation that nothing else reads."""
        source = self._source(node)
        x = self.values[source]
        if x == SOURCE or len(self._readers(source)) > 1:
            raise Unfit("an activation of what is read elsewhere too")
        op = self.ops[x]
        name = "limits" if op.other is None else "last_limits"
        if getattr(op, name) != UNLIMITED or op.kind == conv.LARGEST:
            raise Unfit("an activation of something else than a convolution or a sum")
        self.ops[x] = replace(op, **{name: limits})
        self.values[node] = x

    def _add(self, node: fx.Node) -> None:
        """Let the later one of two operations add the result of the other one."""
        sources = self._source(node), self._source(node, 1)
        early, late = sorted(sources, key=self.values.__getitem__)
        x, other = self.values[late], self.values[early]
        if x == other or len(self._readers(late)) > 1:
            raise Unfit("a sum of what is read elsewhere too")
        op = self.ops[x]
        if op.other is not None or op.kind != conv.CONVOLUTION:
            raise Unfit("a sum of something else than a convolution and another result")
        if node.target in (operator.iadd, "add_") and sources[0] is not late:
            raise Unfit("a result that changes")
        self.ops[x] = replace(op, other=other)
        self.values[node] = x
