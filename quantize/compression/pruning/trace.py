"""What is known of every tensor in a model's graph, and what rules do to it.

A rule says what one family of operations does to the labels of its inputs (rules.py, moves.py);
`follow.py` asks the rule of every node. Here is what a rule works with: the operation (`Op`), the
values of the nodes so far, and the labels, which it ties and pins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.compression.pruning.labels import Labels, Value


def operation(node: torch.fx.Node) -> str:
    """Name of the node's operation without its overload: "linear", "add_"."""
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


def stored_tensors(model: nn.Module, *, all_names: bool = False) -> dict[str, Tensor]:
    """Parameters and buffers by name, a shared one under its first or under all of its names."""
    once = not all_names
    parameters = dict(model.named_parameters(remove_duplicate=once))
    return parameters | dict(model.named_buffers(remove_duplicate=once))


class Trace:
    """The labels of a model, and the value of every node that was followed.

    Args:
        model: the one that the graph was exported from.

    Attributes:
        values: what each node gives: a `Value`, or a list of them.
        node: the one that is being followed.
        computed: layers whose weight is no parameter, and the reason.
    """

    def __init__(self, model: nn.Module):
        tensors = stored_tensors(model)
        self.labels = Labels({name: tensor.shape for name, tensor in tensors.items()})
        self.values: dict[torch.fx.Node, Any] = {}
        self.node: torch.fx.Node
        self.computed: dict[str, str] = {}
        self.first_names = _first_names(model)

    def place(self, node: torch.fx.Node) -> str:
        """Qualified name of the innermost module whose forward made the node."""
        stack = node.meta.get("nn_module_stack") or {}
        name = next(reversed(stack.values()))[0] if stack else ""
        return self.first_names.get(name, name)

    def tensors(self, tree: Any) -> list[Value]:
        """The values of all nodes in nested arguments."""
        values: list[Value] = []

        def visit(node: torch.fx.Node) -> None:
            value = self.values.get(node)
            parts = value if isinstance(value, (tuple, list)) else [value]
            values.extend(part for part in parts if isinstance(part, Value))

        torch.fx.map_arg(tree, visit)
        return values

    def argument(self, node: torch.fx.Node, index: int, name: str, default: Any = None) -> Any:
        """An argument of the node; a tensor is given as its Value."""
        given: Any = node.kwargs.get(name, default)
        if index < len(node.args):
            given = node.args[index]
        return self.values[given] if isinstance(given, torch.fx.Node) else given

    # What can't be followed.

    def pin_parameter(self, value: Value, why: str) -> None:
        """All indices along all dimensions of a parameter stay."""
        assert value.source is not None
        name, _ = value.source
        for dim, size in enumerate(self.labels.shapes[name]):
            if size > 1:
                self.labels.pin(self.labels.along(name, dim), why)

    # Layers: where channels come from and where they go.

    def produce(self, name: str, dim: int, why: str) -> Tensor:
        """Labels of a layer's output channels, which are a dimension of its weight."""
        self.labels.outputs.setdefault((name, dim), why)
        return self.labels.along(name, dim)

    def consume(self, name: str, dim: int, labels: Tensor | None, why: str) -> None:
        """Tie a layer's input channels, a dimension of its weight, to what it reads."""
        self.labels.inputs.setdefault((name, dim), self.place(self.node))
        own = self.labels.along(name, dim)
        read = torch.full_like(own, -1) if labels is None else labels.flatten()
        self.labels.tie(own, read, f"{why} reads other data too")

    def weight_is_computed(self, labels: Tensor | None, why: str) -> None:
        """The layer of the node multiplies by what a computation gives: the inputs it sums over
        stay, its outputs too.
        """
        self.computed.setdefault(self.place(self.node), "its weight is computed anew in every call")
        self.labels.pin(labels, f"{why}: its weight is computed")

    def vector(self, value: Value | None, labels: Tensor | None, size: int, why: str) -> None:
        """A bias, scale or statistic of one entry per channel."""
        if value is None:
            return
        labels = torch.full((size,), -1) if labels is None else labels.flatten()
        source = self.labels.weight(value)
        if source is None:
            self.labels.pin(labels, f"{why} uses a tensor that is not a parameter")
        else:
            name, order = source
            self.labels.tie(self.labels.along(name, order[0]), labels, why)


@dataclass
class Op:
    """One operation of the graph, as rules see it, and what they do to it.

    Args:
        trace: what is known so far.
        node: the operation.
        shape: of its output; a list of shapes where it has several.
        why: names it in reasons.
    """

    trace: Trace
    node: torch.fx.Node
    shape: Any
    why: str

    @property
    def name(self) -> str:
        return operation(self.node)

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """A tensor is given as its `Value`."""
        return self.trace.argument(self.node, index, name, default)

    def arguments(self, *names: str) -> list[Any]:
        """The first ones, by the names they may be given by."""
        return [self.argument(index, name) for index, name in enumerate(names)]

    def pin(self, labels: Tensor | None, text: str = "") -> None:
        """These channels stay. text: follows the operation's name in the reason."""
        self.trace.labels.pin(labels, self.why + text)

    def tie(self, a: Tensor, b: Tensor, text: str = "") -> None:
        """These channels, one by one, go together."""
        self.trace.labels.tie(a, b, self.why + text)

    def across(self, value: Value, dims: Sequence[int], text: str = "") -> Tensor | None:
        """Labels of a value whose dimensions `dims` the operation needs whole."""
        return self.trace.labels.collapse_all(value, dims, self.why + text)

    def result(self, labels: Tensor | None) -> Any:
        """Its output with these labels; each of several outputs."""
        if isinstance(self.shape, list):
            return [Value(one, labels) for one in self.shape]
        return Value(tuple(self.shape), labels)

    def along(self, dim: int, labels: Tensor) -> Value:
        """Its output, whose labels change along `dim` (negative: from the end) alone."""
        if len(labels) == 1:
            return Value(tuple(self.shape))
        size = [1] * len(self.shape)
        size[dim] = len(labels)
        return Value(tuple(self.shape), labels.view(size))

    def settled(self, labels: Tensor | None, text: str = "", shape: Any = None) -> Value:
        """An output of this shape (its own) with labels, which pins channels picked by number."""
        shape = self.shape if shape is None else shape
        return self.trace.labels.settle(shape, labels, self.why + text)

    def met(self, values: Sequence[Value], shape: Sequence[int], text: str = "") -> Value:
        """Operands that meet element by element, broadcast to `shape`."""
        return self.trace.labels.elementwise(values, shape, self.why + text)

    def unfollowed(self, value: Value) -> Value:
        """Its output, through which the channels of `value` can't be followed."""
        self.pin(value.labels, " can't be followed")
        return Value(self.shape)


# what an operation does: gives its output's value or values
Rule = Callable[[Op], Any]


class Rules(dict[str, Rule]):
    """Rules by the names of the operations."""

    def of(self, *names: str) -> Callable[[Rule], Rule]:
        """Decorator: the rule of operations with these names."""

        def add(rule: Rule) -> Rule:
            self.update(dict.fromkeys(names, rule))
            return rule

        return add


def _first_names(model: nn.Module) -> Mapping[str, str]:
    """The first name of every module, by each of its names."""
    first = {id(module): name for name, module in model.named_modules()}
    every = model.named_modules(remove_duplicate=False)
    return {name: first[id(module)] for name, module in every}
