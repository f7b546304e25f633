"""What is known of every tensor in a model's graph, and what rules do to it.

A rule says what one family of operations does to the labels of its inputs (rules.py, moves.py);
`follow.py` asks the rule of every node. Here is what a rule works with: the values of the nodes so
far, and the labels, which it ties and pins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from quantize.compression.pruning.labels import Labels, Value


def operation(node: torch.fx.Node) -> str:
    """Name of the node's operation without its overload: "linear", "add_"."""
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


def stored_tensors(model: nn.Module, *, all_names: bool = False) -> dict[str, torch.Tensor]:
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
        given = node.args[index] if index < len(node.args) else node.kwargs.get(name, default)
        return self.values[given] if isinstance(given, torch.fx.Node) else given

    # What can't be followed.

    def unfollowed(self, value: Value, shape: Any, why: str) -> Value:
        """The result of an operation that the channels of `value` can't be followed through."""
        self.labels.pin(value.labels, f"{why} can't be followed")
        return Value(shape)

    def pin_parameter(self, value: Value, why: str) -> None:
        """All indices along all dimensions of a parameter stay."""
        assert value.source is not None
        name, _ = value.source
        for dim, size in enumerate(self.labels.shapes[name]):
            if size > 1:
                self.labels.pin(self.labels.along(name, dim), why)

    # Layers: where channels come from and where they go.

    def produce(self, name: str, dim: int, why: str) -> torch.Tensor:
        """Labels of a layer's output channels, which are a dimension of its weight."""
        self.labels.outputs.setdefault((name, dim), why)
        return self.labels.along(name, dim)

    def consume(self, name: str, dim: int, labels: torch.Tensor | None, why: str) -> None:
        """Tie a layer's input channels, a dimension of its weight, to what it reads."""
        self.labels.inputs.setdefault((name, dim), self.place(self.node))
        own = self.labels.along(name, dim)
        read = torch.full_like(own, -1) if labels is None else labels.flatten()
        self.labels.tie(own, read, f"{why} reads other data too")

    def weight_is_computed(self, labels: torch.Tensor | None, why: str) -> None:
        """The layer of the node multiplies by what a computation gives: the inputs it sums over
        stay, its outputs too.
        """
        self.computed.setdefault(self.place(self.node), "its weight is computed anew in every call")
        self.labels.pin(labels, f"{why}: its weight is computed")

    def vector(self, value: Value | None, labels: torch.Tensor | None, size: int, why: str) -> None:
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


# What an operation does: called with the trace, the node, the shape of its output (a list of shapes
# for several outputs) and a text that names the operation; gives the output's value or values.
Rule = Callable[[Trace, torch.fx.Node, Any, str], Any]


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
    first: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        first.setdefault(id(module), name)
    return {name: first[id(module)] for name, module in model.named_modules(remove_duplicate=False)}
