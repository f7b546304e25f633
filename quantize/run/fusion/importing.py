"""From what `torch.export` gives to one flat graph.

`Flat` is the model as it is exported; `Importer` reads the exported graph.
"""

from __future__ import annotations

import keyword as python
import operator
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from quantize.run.fusion.edit import argument
from quantize.run.fusion.graph import CaptureError, Program, aten
from quantize.run.fusion.nested import Spec, flatten, unflatten
from quantize.run.fusion.sizes import conditions
from quantize.run.fusion.writes import check_assigned, root_of


class Flat(nn.Module):
    """`model` with flat tensors in and out: the outputs, and after them the buffers that the
    forward assigned anew.

    `seen` remembers how the output is put back together, and the names of those buffers.
    """

    def __init__(self, model: nn.Module, spec: Spec, keyword: bool):
        super().__init__()
        self.model, self.spec, self.keyword = model, spec, keyword
        # In an object of its own: torch.export restores plain attributes.
        self.seen = SimpleNamespace(output=None, assigned=[])

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        before = [(name, module, dict(module._buffers)) for name, module in self.named_modules()]
        arguments = unflatten(self.spec, tensors)
        result = self.model(**arguments) if self.keyword else self.model(*arguments.values())
        flat, self.seen.output = flatten(result, "the model's output")
        self.seen.assigned = []
        for name, module, buffers in before:
            for key in [k for k, buffer in buffers.items() if module._buffers.get(k) is not buffer]:
                value = module._buffers.get(key)
                if not isinstance(value, Tensor) or buffers[key] is None:
                    raise CaptureError(
                        f"its forward makes or removes the buffer "
                        f"{name.removeprefix('model.')}.{key}"
                    )
                self.seen.assigned.append(f"{name}.{key}")
                flat.append(value)
                module._buffers[key] = buffers[key]
        return tuple(flat)


class Importer:
    """Copies an exported graph: parameters, buffers and lifted constants become `get_attr` nodes,
    blocks are opened.
    """

    def __init__(self, exported: Any, flat: Flat) -> None:
        self.exported, self.flat = exported, flat
        self.module, self.graph = nn.Module(), fx.Graph()
        self.known: dict[int, str] = {}  # tied weights stay one tensor
        self.taken: dict[str, fx.Node] = {}
        self.values: dict[fx.Node, Any] = {}
        self.sizes: list[list[int | str]] = []

    def program(
        self, arguments: dict[str, Spec], keyword: bool, shapes: Sequence[Sequence[int]]
    ) -> Program:
        names, tensors = self._attributes()
        source = self.exported.graph_module
        for node in source.graph.nodes:
            if node.op == "placeholder" and node.name in names:
                name = names[node.name]
                self.values[node] = self._constant(name, tensors[name])
            elif node.op == "placeholder":
                self.values[node] = self._placeholder(node)
            elif node.op == "output":
                values = list(map_arg(node.args[0], self._value))
                self._output(values, tensors)
            elif not _is_block(source, node) and node.target not in _CHECKS:
                self.values[node] = self._inline(source, node)
        made = fx.GraphModule(self.module, self.graph)
        program = Program(
            made, arguments, keyword, self.flat.seen.output, self.sizes, self._largest()
        )
        program.conditions, program.doubtful = conditions(self.exported, shapes)
        for i, sizes in enumerate(self.sizes):  # torch.export takes no free size for 1
            free = [d for d, size in enumerate(sizes) if d and isinstance(size, str)]
            program.doubtful += [f"input_{i}.size({d}) != 1" for d in free]
        return program

    def _output(self, values: list[Any], tensors: dict[str, Tensor]) -> None:
        """Outputs; what was assigned to buffers is copied into them first, all of it as it was
        before the first copy.
        """
        count = len(values) - len(self.flat.seen.assigned)
        assigned = [
            v if root_of(v).op == "call_function" else self._clone(v) for v in values[count:]
        ]
        for name, value in zip(self.flat.seen.assigned, assigned, strict=True):
            state = self._constant(name, tensors[name])
            check_assigned(name.removeprefix("model."), tensors[name], value.meta["val"])
            self.graph.call_function(aten.copy_.default, (state, value)).meta["assigned"] = True
        self.graph.output(tuple(values[:count]))

    def _clone(self, value: fx.Node) -> fx.Node:
        copy = self.graph.call_function(aten.clone.default, (value,))
        copy.meta["val"] = value.meta["val"]
        return copy

    def _attributes(self) -> tuple[dict[str, str], dict[str, Tensor]]:
        """The qualified name behind each placeholder of the export, and the tensors by that
        name.
        """
        signature = self.exported.graph_signature
        names = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        tensors = dict(self.flat.named_parameters(remove_duplicate=False))
        tensors |= dict(self.flat.named_buffers(remove_duplicate=False))
        tensors |= {n: c for n, c in self.exported.constants.items() if isinstance(c, Tensor)}
        return names, tensors

    def _largest(self) -> dict[str, int]:
        largest = {}
        for symbol, bounds in self.exported.range_constraints.items():
            upper = str(bounds.upper)
            if upper.isdigit() and int(upper) < 2**31:  # else: infinity
                largest[str(symbol)] = int(upper)
        return largest

    def _value(self, node: fx.Node) -> Any:
        return self.values[node]

    def _placeholder(self, node: fx.Node) -> fx.Node:
        new = self.graph.placeholder(f"input_{len(self.sizes)}")
        new.meta = dict(node.meta)
        self.sizes.append(
            [int(str(s)) if str(s).isdigit() else str(s) for s in node.meta["val"].shape]
        )
        return new

    def _constant(self, name: str, tensor: Tensor) -> fx.Node:
        key = self.known.get(id(tensor)) or _attribute(name.removeprefix("model."))
        while id(tensor) not in self.known and key in self.taken:
            key += "_"
        self.known[id(tensor)] = key
        if key not in self.taken:
            self.module.register_buffer(key, tensor.detach())
            self.taken[key] = self.graph.get_attr(key)
            self.taken[key].meta["val"] = tensor.detach()
        return self.taken[key]

    def _inline(self, source: fx.GraphModule, node: fx.Node) -> Any:
        """Copy one node, opening the blocks that only set a mode which is already set."""
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return self._open(source, node)
        if node.op == "get_attr":
            return self._constant(
                f"{node.target}_{len(self.taken)}", getattr(source, str(node.target))
            )
        if node.target is operator.getitem:
            parts = self.values[argument(node, 0)]
            if not isinstance(parts, fx.Node):
                return parts[node.args[1]]
        return self.graph.node_copy(node, self._value)

    def _open(self, source: fx.GraphModule, node: fx.Node) -> Any:
        target: Any = node.target
        name = target.name()
        place = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}.get(name)
        if place is None or (name == "wrap_with_autocast" and node.args[2]):
            raise CaptureError(
                f"it uses {name}, data-dependent control flow or a mode that can't be fused"
            )
        inner = getattr(source, argument(node, place).target)
        inputs = iter([map_arg(a, self._value) for a in node.args[place + 1 :]])
        for child in inner.graph.nodes:
            if child.op == "placeholder":
                self.values[child] = next(inputs)
            elif child.op == "output":
                return map_arg(child.args[0], self._value)
            elif not _is_block(inner, child):
                self.values[child] = self._inline(inner, child)
        raise AssertionError("a graph without an output")


def _is_block(module: fx.GraphModule, node: fx.Node) -> bool:
    """Is this node a graph within the graph? It is opened where it is called."""
    if node.op != "get_attr":
        return False
    return not isinstance(getattr(module, str(node.target)), Tensor)


def _attribute(name: str) -> str:
    """`layers.0.weight` as a Python name."""
    name = re.sub(r"\W", "_", name.replace(".", "__"))
    return name if name.isidentifier() and not python.iskeyword(name) else f"_{name}"


_CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}
