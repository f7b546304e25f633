"""`Folded`: a graph run as an ordinary module, called like the model it came from."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from quantize.run.fusion.graph import Program
from quantize.run.fusion.nested import Spec, flatten, unflatten
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
        main, first = _split(program)
        self.run = fx.GraphModule(program.module, main)
        self.prepare = fx.GraphModule(program.module, first)
        self.arguments, self.keyword = program.arguments, program.keyword
        self.output, self.sizes = program.output, program.sizes
        self.conditions, self.notes = tuple(program.conditions), tuple(program.notes)
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
            if _form(shape) != _form(spec):
                raise ValueError(
                    f"argument {name!r} differs in form from what the model was folded for"
                )
            tensors += part
        for i, (tensor, sizes) in enumerate(zip(tensors, self.sizes, strict=True)):
            pairs = zip(sizes, tensor.shape, strict=False)
            if tensor.dim() != len(sizes) or any(s != n for s, n in pairs if isinstance(s, int)):
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
        own = {**self.__dict__, "_ready": None}
        new.__dict__.update({key: copy.deepcopy(value, memo) for key, value in own.items()})
        return new

    def _apply(self, fn, recurse=True):
        self._ready = None
        return super()._apply(fn, recurse)


def _split(program: Program) -> tuple[fx.Graph, fx.Graph]:
    """The graph of a call, and the one that prepares weights for it: what that gives comes after
    the inputs.
    """
    main, first = fx.Graph(), fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    earlier: dict[fx.Node, fx.Node] = {}
    nodes = list(program.graph.nodes)
    prepared = [node for node in nodes if node.meta.get("prepare")]
    ready = [node for node in prepared if not all(u.meta.get("prepare") for u in node.users)]
    for node in [*(node for node in nodes if node.op == "placeholder"), *ready]:
        values[node] = main.placeholder(node.name)
    for node in nodes:
        if node.meta.get("prepare"):
            earlier[node] = first.node_copy(node, earlier.__getitem__)
        elif node.op == "get_attr":
            users = [bool(user.meta.get("prepare")) for user in node.users]
            if any(users):
                earlier[node] = first.get_attr(node.target)
            if not all(users):
                values[node] = main.get_attr(node.target)
        elif node.op == "call_function":
            values[node] = main.node_copy(node, values.__getitem__)
        elif node.op == "output":
            main.output(map_arg(node.args[0], values.__getitem__))
    first.output(tuple(earlier[node] for node in ready))
    return main, first


def _form(spec: Spec) -> tuple[Any, ...]:
    """What a call must have in common with the example, beside its tensors."""
    value = spec.value if spec.kind == "constant" else None
    return spec.kind, spec.keys, len(spec.children), value
