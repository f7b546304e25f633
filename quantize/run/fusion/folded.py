"""`Folded`: a graph run as an ordinary module, called like the model it came from."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from quantize.run.fusion.graph import Program
from quantize.run.fusion.nested import flatten, unflatten
from quantize.run.fusion.sizes import holds


class Folded(nn.Module):
    """Runs a folded graph in eager mode. Takes the arguments of the model, in the form of the
    example inputs, and returns what it returned. The tensors are plain; packed weights are made on
    the first call and again after a change or a move.
    """

    # Read by `quantize.save`: a graph follows from a model by running torch.export, which no file
    # may ask for.
    not_fused = "the model is folded already: fold or fuse the model that it was made from"
    not_saved = (
        "a model that quantize.fold made has no checkpoint: save the model itself, or "
        "quantize.fuse gives a file"
    )

    def __init__(self, program: Program) -> None:
        super().__init__()
        main, first = fx.Graph(), fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        earlier: dict[fx.Node, fx.Node] = {}
        ready = []
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = main.placeholder(node.name)
        for node in program.graph.nodes:
            if node.op == "get_attr":
                users = [bool(u.meta.get("prepare")) for u in node.users]
                if any(users):
                    earlier[node] = first.get_attr(node.target)
                if not all(users):
                    values[node] = main.get_attr(node.target)
            elif node.meta.get("prepare"):
                earlier[node] = first.node_copy(node, lambda n: earlier[n])
                if any(not u.meta.get("prepare") for u in node.users):
                    ready.append(earlier[node])
                    with main.inserting_before(
                        next(iter(n for n in main.nodes if n.op != "placeholder"), None)
                    ):
                        values[node] = main.placeholder(node.name)
            elif node.op == "output":
                main.output(map_arg(node.args[0], lambda n: values[n]))
            elif node.op == "call_function":
                values[node] = main.node_copy(node, lambda n: values[n])
        first.output(tuple(ready))
        self.run = fx.GraphModule(program.module, main)
        self.prepare = fx.GraphModule(program.module, first)
        self.arguments, self.keyword, self.output = (
            program.arguments,
            program.keyword,
            program.output,
        )
        self.sizes, self.conditions, self.notes = (
            program.sizes,
            tuple(program.conditions),
            tuple(program.notes),
        )
        self._ready: tuple[Any, list[Tensor]] | None = None
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tensors = self._bind(args, kwargs)
        state = [(t.data_ptr(), t._version) for t in self.prepare.buffers()]
        if self._ready is None or self._ready[0] != state:
            with torch.no_grad():
                self._ready = (state, list(self.prepare()))
        return unflatten(self.output, self.run(*tensors, *self._ready[1]))

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        names = list(self.arguments)
        if len(args) > len(names):
            raise TypeError(f"takes {len(names)} arguments ({', '.join(names)}), got {len(args)}")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.keys() != self.arguments.keys():
            constants = {n: s.value for n, s in self.arguments.items() if s.kind == "constant"}
            given = {**constants, **given}
        if given.keys() != self.arguments.keys():
            raise TypeError(
                f"was folded for the arguments {', '.join(names)}, got {', '.join(given) or 'none'}"
            )
        tensors: list[Tensor] = []
        for name, spec in self.arguments.items():
            part, shape = flatten(given[name], name)
            if (shape.kind, shape.keys, len(shape.children)) != (
                spec.kind,
                spec.keys,
                len(spec.children),
            ) or (spec.kind == "constant" and shape.value != spec.value):
                raise ValueError(
                    f"argument {name!r} differs in form from what the model was folded for"
                )
            tensors += part
        for i, (tensor, sizes) in enumerate(zip(tensors, self.sizes, strict=True)):
            fixed = all(
                isinstance(s, str) or s == n for s, n in zip(sizes, tensor.shape, strict=False)
            )
            if tensor.dim() != len(sizes) or not fixed:
                raise ValueError(
                    f"input {i} has shape {list(tensor.shape)}; the model was folded for {sizes}"
                )
        shapes = [t.shape for t in tensors]
        for condition in self.conditions:
            if not holds(condition, shapes):
                raise ValueError(
                    f"sizes must be so that {condition}, as when the model was folded; got "
                    f"{[*map(list, shapes)]}"
                )
        return tensors

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a folded model can't be pickled: pickle the model itself and fold it again, or "
            "quantize.fuse gives a file"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Folded:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        nn.Module.__init__(new)
        new.__dict__.update(
            {k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "_ready"}
        )
        new._ready = None
        return new

    def _apply(self, fn, recurse=True):
        self._ready = None
        return super()._apply(fn, recurse)
