"""Follow channels through the graph of `torch.export`: one rule for each family of operations.

Export is used because it traces what models really do (data-dependent Python control flow
excepted). Composite operations are kept whole: a linear, a convolution, an attention or a norm is
easier to follow than its decomposition. An operation without a rule pins the channels that reach
it: they stay, and the summary names the operation.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from quantize.calibration import arguments, call, copied, untouched, without_cache
from quantize.compression.pruning.labels import Labels, Value
from quantize.compression.pruning.rules import RULES, SEES_WEIGHTS

POINTWISE = set(
    "dropout alpha_dropout feature_dropout native_dropout to _to_copy type_as hardswish prelu "
    "copy contiguous float "
    "lift_fresh_copy alias detach __and__ __or__ __xor__ logical_not masked_fill gelu rrelu "
    "fill zero zeros_like ones_like "
    "full_like empty_like rand_like randn_like clone where".split()
)


def export(model: nn.Module, example_inputs: Any) -> torch.export.ExportedProgram:
    """Graph of `model` (in eval mode; it may be changed) on the inputs.

    Raises ValueError when the model doesn't run on them or can't be exported.
    """
    check_inputs(example_inputs)
    with untouched(model), without_cache(model), torch.no_grad():
        try:
            call(model, example_inputs)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} doesn't run on example_inputs: {_first_line(error)}"
            ) from error
    _return_plain_containers(model)
    args, kwargs = arguments(copied(example_inputs, {}))
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(
            False
        )  # or a whole encoder layer becomes one opaque operation
        with untouched(model), without_cache(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:
        message = (
            f"{type(model).__name__} can't be exported, so its channels can't be followed: "
            f"{_first_line(error)}"
        )
        raise ValueError(message) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def check_inputs(inputs: Any) -> None:
    """Raise TypeError for inputs that are no tensor, tuple or dict."""
    if not isinstance(inputs, (torch.Tensor, tuple, list, Mapping)):
        raise TypeError(
            f"example_inputs must be a tensor, a tuple or a dict, got {type(inputs).__name__}"
        )


def _return_plain_containers(model: nn.Module) -> None:
    """Make `model` return dicts where it returns dataclasses, which export doesn't know."""
    forward = model.forward

    @functools.wraps(forward)
    def returning_dicts(*args: Any, **kwargs: Any) -> Any:
        return _plain(forward(*args, **kwargs))

    model.forward = returning_dicts


def _plain(output: Any) -> Any:
    kind: Any = type(output)
    if dataclasses.is_dataclass(kind) and not isinstance(output, Mapping):
        names = [field.name for field in dataclasses.fields(kind)]
        return {name: _plain(getattr(output, name)) for name in names}
    if kind is type:
        return output
    if type(output) in (tuple, list):
        parts = [_plain(part) for part in output]
        return parts if type(output) is list else tuple(parts)
    if type(output) is dict:
        return {key: _plain(part) for key, part in output.items()}
    return output


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def operation(node: torch.fx.Node) -> str:
    """Name of the node's operation without its overload: "linear", "add_"."""
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


def _first_names(model: nn.Module) -> dict[str, str]:
    """The first name of every module that has several, by each of its names."""
    first: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        first.setdefault(id(module), name)
    return {name: first[id(module)] for name, module in model.named_modules(remove_duplicate=False)}


class Trace:
    """The labels of a model after one walk over its graph, and the value of every node."""

    def __init__(self, program: torch.export.ExportedProgram, model: nn.Module):
        tensors = dict(model.named_parameters()) | dict(
            model.named_buffers()
        )  # a shared tensor under its first name
        self.labels = Labels({name: t.shape for name, t in tensors.items()})
        self.values: dict[torch.fx.Node, Any] = {}
        self.first_names = _first_names(model)
        self.computed: dict[str, str] = {}  # layers whose weight is no parameter, and the reason
        names = {id(t): name for name, t in tensors.items()}
        every = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers(remove_duplicate=False)
        )
        first = {name: names[id(t)] for name, t in every.items()}
        signature = program.graph_signature
        sources = dict(signature.inputs_to_parameters) | dict(signature.inputs_to_buffers)
        for node in program.graph.nodes:
            if node.op == "placeholder" and node.name in sources and sources[node.name] in first:
                name = first[sources[node.name]]
                self.values[node] = Value(tuple(tensors[name].shape), source=(name, ()))
            elif node.op == "output":
                for value in self.tensors(node.args):
                    self.labels.pin(value.labels, "it is an output of the model")
            else:
                self.values[node] = self._visit(node)

    def place(self, node: torch.fx.Node) -> str:
        """Qualified name of the innermost module whose forward made the node."""
        stack = node.meta.get("nn_module_stack") or {}
        name = next(reversed(stack.values()))[0] if stack else ""
        return self.first_names.get(name, name)

    def _visit(self, node: torch.fx.Node) -> Any:
        self.node = node
        out = node.meta.get("val")
        shapes = (
            [tuple(t.shape) for t in out if isinstance(t, torch.Tensor)]
            if isinstance(out, (tuple, list))
            else None
        )
        shape = tuple(out.shape) if isinstance(out, torch.Tensor) else ()
        if node.op != "call_function" or not isinstance(out, (torch.Tensor, tuple, list)):
            return Value(shape)
        if getattr(node.target, "__name__", "") == "getitem":
            source: Any = node.args[0]
            place: Any = node.args[1]
            held = self.values.get(source)
            return held[place] if isinstance(held, (tuple, list)) else Value(shape)
        name = getattr(getattr(node.target, "overloadpacket", None), "__name__", str(node.target))
        base = name if name.startswith("__") else name.rstrip("_")
        why = f"{name} in module {self.place(node)!r}"
        rule = RULES.get(base)
        operands = self.tensors((node.args, node.kwargs))
        sizes = [*shape, *(size for value in operands for size in value.shape)]
        decided = any(
            isinstance(size, torch.SymInt) for size in sizes
        )  # by the data: which rows go to an expert, say
        concerned = base in SEES_WEIGHTS or any(v.labels is not None or v.source for v in operands)
        if rule is not None and concerned and not decided:
            return rule(self, node, shape if shapes is None else shapes, why)
        if not decided and (
            torch.Tag.pointwise in getattr(node.target, "tags", ()) or base in POINTWISE
        ):
            result = self.labels.elementwise(
                operands, shape, f"{why} mixes it with data that can't shrink"
            )
            return result if shapes is None else [result, *[Value(s) for s in shapes[1:]]]
        for value in operands:
            self.labels.pin(value.labels, f"{why} can't be followed")
            if value.source:
                self.pin_parameter(value, f"{why} can't be followed")
        return Value(shape) if shapes is None else [Value(s) for s in shapes]

    def pin_parameter(self, value: Value, why: str) -> None:
        source: Any = value.source
        name = source[0]
        for dim, size in enumerate(self.labels.shapes[name]):
            if size > 1:
                self.labels.pin(self.labels.along(name, dim), why)

    def tensors(self, tree: Any) -> list[Value]:
        found: list[Value] = []

        def visit(node: torch.fx.Node) -> None:
            value = self.values.get(node)
            found.extend(
                v
                for v in (value if isinstance(value, (tuple, list)) else [value])
                if isinstance(v, Value)
            )

        torch.fx.map_arg(tree, visit)
        return found

    def argument(self, node: torch.fx.Node, index: int, name: str, default: Any = None) -> Any:
        """An argument of the node; a tensor is given as its Value."""
        given = node.args[index] if index < len(node.args) else node.kwargs.get(name, default)
        return self.values[given] if isinstance(given, torch.fx.Node) else given

    # Layers: where channels come from and where they go.

    def produce(self, name: str, dim: int, why: str) -> torch.Tensor:
        self.labels.outputs.setdefault((name, dim), why)
        return self.labels.along(name, dim)

    def consume(self, name: str, dim: int, labels: torch.Tensor | None, why: str) -> None:
        self.labels.inputs.setdefault((name, dim), self.place(self.node))
        own = self.labels.along(name, dim)
        self.labels.tie(
            own,
            torch.full_like(own, -1) if labels is None else labels.flatten(),
            f"{why} reads other data too",
        )

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
            self.labels.tie(self.labels.along(source[0], source[1][0]), labels, why)
