"""`Program`: a model as a flat graph of aten operators on tensors, with the facts the passes
need.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from quantize import surgery
from quantize.run.fusion.nested import Spec, flatten

aten = torch.ops.aten


class CaptureError(ValueError):
    """`torch.export` can't follow this model; the message says why."""


@dataclass
class Program:
    """A graph over flat tensors (placeholders), constants (`get_attr`) and operators, and how
    callers see it.
    """

    module: fx.GraphModule
    arguments: dict[str, Spec]  # the caller's arguments by name, in order
    keyword: bool  # the caller passes them by name
    output: Spec
    # per tensor and dimension: a fixed size, or the name of a size that varies
    sizes: list[list[int | str]]
    largest: dict[str, int] = field(default_factory=dict)  # varying sizes that have an upper bound
    # on `input_0.size(1)` and so on: where the export took a decision
    conditions: list[str] = field(default_factory=list)
    # more of them, which matter only if the model asked, not torch
    doubtful: list[str] = field(default_factory=list)
    # lines of TorchScript that a file runs when it is loaded
    at_load: list[str] = field(default_factory=list)
    widened: int = (
        1  # 2 if a batch of one was doubled for the export: hints about sizes are too large by this
    )
    notes: list[str] = field(default_factory=list)  # what the passes did, for people
    # constants that the graph writes into, as they were
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    writes_inputs: bool = False

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def call(self, target: Any, *args: Any, val: Any = None, **kwargs: Any) -> fx.Node:
        """A new operator, at the place that `before` names. val: what its result looks like."""
        node = self.graph.call_function(target, args, kwargs)
        if val is not None:
            node.meta["val"] = val
        return node

    def before(self, node: fx.Node) -> AbstractContextManager[None]:
        """While it lasts, new operators come before this one."""
        return self.graph.inserting_before(node)

    def note(self, count: int, what: str) -> None:
        """Say what a pass did so often, if it did."""
        if count:
            self.notes.append(f"{count} {what}")

    def copy(self) -> Program:
        """The same program with a graph of its own; the tensors are shared."""
        module, graph = nn.Module(), fx.Graph()
        for name, tensor in self.module.named_buffers():
            module.register_buffer(name, tensor)
        graph.output(graph.graph_copy(self.graph, {}))
        made = fx.GraphModule(module, graph)
        lists = {"notes": [*self.notes], "conditions": [*self.conditions]}
        return replace(self, module=made, **lists)

    def rewind(self) -> None:
        """Put the state back to what it was; whatever was built of this program shares it."""
        for name, before in self.state.items():
            getattr(self.module, name).copy_(before)

    def operators(self) -> Counter[str]:
        """How many operators of each kind run per call; what is prepared at load is not counted."""
        nodes = [
            n for n in self.graph.nodes if n.op == "call_function" and not n.meta.get("prepare")
        ]
        return Counter(
            str(n.target).removesuffix(".default")
            for n in nodes
            if isinstance(n.target, torch._ops.OpOverload)
        )


def lines_of(error: BaseException) -> list[str]:
    """What an error says, line by line; TorchScript puts the reason last, others first."""
    lines = [line.strip() for line in str(error).splitlines()]
    return [line for line in lines if line] or ["no message"]


def check_inputs(model: nn.Module, example_inputs: Any) -> None:
    """Raise ValueError or TypeError for a model in training mode, a model off the CPU, or inputs
    that don't fit it.
    """
    surgery.check_editable(model)
    if reason := getattr(type(model), "not_fused", None):
        raise TypeError(reason)
    for name, module in model.named_modules():
        if reason := getattr(type(module), "not_fused", None):
            raise ValueError(f"layer {name!r} ({type(module).__name__}) can't be fused: {reason}")
        if module.training:
            where = f"module {name!r}" if name else "model"
            raise ValueError(
                f"{where} ({type(module).__name__}) is in training mode; fusing needs eval mode: "
                f"call model.eval() first"
            )
    surgery.check_initialised(model)
    tensors, _ = flatten(example_inputs, "example_inputs")
    if not tensors:
        raise ValueError("example_inputs has no tensor in it")
    own = {t.device for t in [*model.parameters(), *model.buffers()]}
    if len(own) > 1:
        raise ValueError(
            f"the model is spread over {sorted(map(str, own))}: move it to one device before fusing"
        )
    for i, tensor in enumerate(tensors):
        if own and tensor.device not in own:
            device = next(iter(own))
            raise ValueError(
                f"tensor {i} of example_inputs is on {tensor.device} and the model on {device}: "
                f"move one of them"
            )


def named_arguments(model: nn.Module, example_inputs: Any) -> tuple[dict[str, Any], bool]:
    """The example inputs by the parameter names of `model.forward`, and whether the caller passes
    them by name.
    """
    known = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in known if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if isinstance(example_inputs, Mapping):
        first = [name for name in names if name in example_inputs]
        return {
            name: example_inputs[name] for name in dict.fromkeys([*first, *example_inputs])
        }, True
    many = isinstance(example_inputs, (tuple, list))
    values = tuple(example_inputs) if many else (example_inputs,)
    names += [f"argument_{i}" for i in range(len(names), len(values))]
    return dict(zip(names, values, strict=False)), False


def is_in_place(node: fx.Node) -> bool:
    """Does this operator write into one of its arguments?"""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
