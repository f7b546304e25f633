"""A module of int8 convolutions as a program that runs in one native call.

`trace` reads the module's forward (torch.fx) where it is made of int8 convolutions, activations,
additions of two results, padding with zeros, max pooling, means of channels, products with what is
made of these alone, and int8 linear layers behind them. An addition and an activation are done
while the convolution before them stores its results; the ranges of samples are noted there too. A
convolution does the padding before it. A linear layer is a convolution of images of one pixel. A
forward that asks for the sizes of its input is read once for each shape. Between the steps
everything is float32 with the channels last, and each number is computed as by the modules one
after the other: the bits are the same, so the module's own forward can run in a program's place at
any time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from quantize import surgery
from quantize.native import conv
from quantize.native.conv import PLAIN, Ending, Geometry
from quantize.nn.floats import pixels_kept
from quantize.nn.int8 import Int8Linear
from quantize.nn.int8_conv import Int8Conv, by_pixel
from quantize.nn.int8_tracer import (
    ACTIVATIONS,
    ADDS,
    FLATTENINGS,
    LEAVES,
    MEANS,
    PRODUCTS,
    RELU,
    RELU6,
    AsksForSize,
    Call,
    Tracer,
    Unfit,
    geometry_of,
    is_mean,
    kernel_of,
    pads_of,
)

SOURCE = -1  # the number of the module's input among the values
POOL = nn.AdaptiveAvgPool2d(1)


@dataclass(frozen=True)
class Op:
    """One operation. Values are numbered: -1 is the input, and each operation gives the next one.

    Args:
        module: an Int8Conv, a max pooling, or an average pooling to one pixel.
        x: the value that it reads.
        ending: what becomes of its results.
        other: a value that is added to them then, or None.
        gate: a value [N, C, 1, 1] that x is multiplied by, or None.
        last_ending: and of the sums.
        before, after: zeros that are added to each dimension of x, beyond the module's own.
        flat: as the last one, does it give one pixel without its dimensions, [N, C]?
    """

    module: Any
    x: int
    ending: Ending = PLAIN
    other: int | None = None
    gate: int | None = None
    last_ending: Ending = PLAIN
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    flat: bool = False

    @property
    def reads(self) -> list[int]:
        return [value for value in (self.x, self.other, self.gate) if value is not None]

    def moved(self, move: Callable[[int], int]) -> Op:
        """The same, but for the numbers of the values that it reads."""
        other = None if self.other is None else move(self.other)
        gate = None if self.gate is None else move(self.gate)
        return replace(self, x=move(self.x), other=other, gate=gate)

    def ended(self, ending: Ending) -> Op | None:
        """The same, and at last this; None where it can't be told to do it."""
        name = "ending" if self.other is None else "last_ending"
        free = self.has_weights and getattr(self, name) == PLAIN
        return replace(self, **{name: ending}) if free else None

    @property
    def has_weights(self) -> bool:
        return isinstance(self.module, Int8Conv)

    @property
    def kind(self) -> int:
        """As in `native.conv`."""
        if not self.has_weights:
            return conv.MEAN if is_mean(self.module) else conv.LARGEST
        depthwise = self.module.geometry.depthwise(self.module.packed)
        return conv.DEPTHWISE if depthwise else conv.CONVOLUTION

    @property
    def kernel(self) -> tuple[int, ...]:
        return (1, 1) if self.kind == conv.MEAN else kernel_of(self.module)

    def sizes(self, size: Sequence[int]) -> tuple[int, ...]:
        """Of the result. Raises ValueError where the input is smaller than the kernel."""
        return (1, 1) if self.kind == conv.MEAN else self.geometry.sizes(size, self.kernel)

    @property
    def geometry(self) -> Geometry:
        if self.kind == conv.MEAN:
            return conv.STILL
        own = geometry_of(self.module)
        if not self.before:
            return own
        before = tuple(map(operator.add, own.before, self.before))
        return replace(own, before=before, after=tuple(map(operator.add, own.after, self.after)))

    def needs_range(self) -> bool:
        """Does it ask for the range of each sample of x?"""
        return self.kind == conv.CONVOLUTION and not self.geometry.pointwise(self.kernel)


def trace(module: nn.Module, shape: Sequence[int] | None = None) -> list[Op] | None:
    """The operations of a module's forward, whose last one gives its result; None where it does
    anything else.

    Args:
        module: with convolutions in it.
        shape: of its input; None: of any.

    Raises: AsksForSize: it does other things for other shapes, and none is given.
    """
    for inside in module.modules():
        if (inside._parameters or inside._buffers) and not isinstance(inside, LEAVES):
            return None
    first = next((m for m in module.modules() if isinstance(m, Int8Conv)), None)
    if first is None:
        return None
    # the copy's forward may keep what it is traced with; what isn't run there is not copied
    still = (m for m in module.modules() if isinstance(m, LEAVES))
    memo: dict[int, Any] = {
        id(one): one for one in (*module.parameters(), *module.buffers(), *still)
    }
    try:
        copied = surgery.deepcopy(module, memo)
        unknown = None, first.in_channels, *[None] * len(first.kernel_size)
        with surgery.without_logs():
            graph = Tracer(tuple(shape or unknown)).trace(Call(copied))
        ops = _Reading(Call(module), graph).ops
        reads = {op.module.in_channels for op in ops if op.x == SOURCE and op.has_weights}
        return ops if reads == {first.in_channels} else None
    except AsksForSize:
        raise
    except Exception:  # a forward that reads values, or whatever else a proxy can't answer
        return None


class _Reading:
    """Operations of a graph. module: whose submodules the graph names."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module, self.ops = module, list[Op]()
        self.values: dict[fx.Node, int] = {}  # by the node that gives it
        self.same: dict[fx.Node, fx.Node] = {}  # nodes that give what another one gave
        self.padded: dict[fx.Node, dict[str, Any]] = {}  # zeros that a node adds
        self.gated: dict[fx.Node, tuple[int, int]] = {}  # values that a node multiplies
        self.flat: set[fx.Node] = set()  # nodes that give [N, C]
        for node in graph.nodes:
            if self._passes_on(node):
                self.same[node] = self._source(node)
        for node in graph.nodes:
            if node not in self.same:
                getattr(self, f"_{node.op}")(node)

    def _passes_on(self, node: fx.Node) -> bool:
        """Does it give what it reads? Notes the zeros that it adds."""
        found = None
        if node.op == "call_module":
            found = self.module.get_submodule(str(node.target))
        pads = pads_of(node, found, 2)
        if pads is not None and any(map(any, pads)):
            self.padded[node] = dict(zip(("before", "after"), pads, strict=True))
        asleep = type(found) is nn.Dropout and not found.training
        return (
            type(found) is nn.Identity or asleep or (pads is not None and node not in self.padded)
        )

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
        source, kind = self._source(node), type(found)
        if node in self.padded:
            return
        if kind is nn.ReLU or kind is nn.ReLU6:
            self._activate(node, RELU if kind is nn.ReLU else RELU6)
        elif kind is Int8Conv and found.padding_mode == "zeros" and not found.floats:
            self._convolve(node, source, found)
        elif kind is nn.MaxPool2d and not (found.ceil_mode or found.return_indices):
            self._append(node, Op(found, self.values[source]))
        elif kind is nn.AdaptiveAvgPool2d and is_mean(found):
            self._append(node, Op(found, self.values[source]))
        elif kind is Int8Linear and source in self.flat:
            layer = by_pixel(found.packed, found.scale, found.bias, found.activation)
            self._append(node, Op(layer, self.values[source], layer.ending))
            self.flat.add(node)
        else:
            raise Unfit(f"a {kind.__name__}")

    def _convolve(self, node: fx.Node, source: fx.Node, layer: Int8Conv) -> None:
        """A convolution does the padding before it, unless it has a range for each pixel."""
        pads = self.padded.get(source, {})
        if pads and (len(layer.kernel_size) != 2 or layer.geometry.pointwise(layer.kernel_size)):
            raise Unfit("padding before a convolution that can't do it")
        x = self._source(source) if pads else source
        if x not in self.gated:
            self._append(node, Op(layer, self.values[x], layer.ending, **pads))
        elif layer.geometry.pointwise(layer.kernel_size):
            value, gate = self.gated[x]
            self._append(node, Op(layer, value, layer.ending, gate=gate))
        else:
            raise Unfit("a product that is read by something else than a kernel of one pixel")

    def _call_function(self, node: fx.Node) -> None:
        if node in self.padded:
            return
        if node.target in MEANS:
            return self._average(node)
        options = node.kwargs.keys() - {"inplace"}
        if options:
            raise Unfit(f"options {options}")
        if node.target in ADDS and len(node.args) == 2:
            self._add(node)
        elif node.target in PRODUCTS and len(node.args) == 2:
            self._multiply(node)
        elif node.target in ACTIVATIONS and len(node.args) == 1:
            self._activate(node, ACTIVATIONS[node.target])
        elif node.target in FLATTENINGS and node.args[1:] in ((1,), (1, -1)):
            self._flatten(node)
        else:
            raise Unfit(f"a call of {node.target}")

    _call_method = _call_function

    def _get_attr(self, node: fx.Node) -> None:
        raise Unfit("a tensor of the module")

    def _output(self, node: fx.Node) -> None:
        source = self._source(node)
        if self.values[source] != len(self.ops) - 1 or len(self._readers(source)) > 1:
            raise Unfit("a result that is read again")
        self.ops[-1] = replace(self.ops[-1], flat=source in self.flat)

    def _append(self, node: fx.Node, op: Op) -> None:
        self.values[node] = len(self.ops)
        self.ops.append(op)

    def _activate(self, node: fx.Node, ending: Ending) -> None:
        """Cut off the results of an operation that nothing else reads."""
        source = self._source(node)
        x = self.values[source]
        if x == SOURCE or len(self._readers(source)) > 1:
            raise Unfit("an activation of what is read elsewhere too")
        op = self.ops[x].ended(ending)
        if op is None:
            raise Unfit("an activation of something else than a convolution or a sum")
        self.ops[x] = op
        self.values[node] = x
        if source in self.flat:
            self.flat.add(node)

    def _average(self, node: fx.Node) -> None:
        """Of the pixels of images."""
        kept = pixels_kept(*node.args[1:], **node.kwargs)
        if node.target is F.adaptive_avg_pool2d:
            kept = node.args[1:] in ((1,), ((1, 1),)) or None
        if kept is None:
            raise Unfit("a mean of something else than images")
        self._append(node, Op(POOL, self.values[self._source(node)]))
        if not kept:
            self.flat.add(node)

    def _flatten(self, node: fx.Node) -> None:
        source = self._source(node)
        if not self._is_pooled(self.values[source]):
            raise Unfit("an image as a row")
        self.values[node] = self.values[source]
        self.flat.add(node)

    def _is_pooled(self, value: int) -> bool:
        """Is it made of the means of channels, and has one pixel?"""
        if value == SOURCE:
            return False
        op = self.ops[value]
        if op.kind == conv.MEAN:
            return True
        pixels = op.has_weights and op.geometry.pointwise(op.kernel) and op.other is None
        return pixels and self._is_pooled(op.x)

    def _multiply(self, node: fx.Node) -> None:
        """Note a product of an image and a gate for each of its channels."""
        values = [self.values[self._source(node, at)] for at in range(2)]
        whole, gate = sorted(values, key=self._is_pooled)
        if self._is_pooled(whole) or not self._is_pooled(gate):
            raise Unfit("a product of something else than an image and numbers of its channels")
        self.gated[node] = whole, gate

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
