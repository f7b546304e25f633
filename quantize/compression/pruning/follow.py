"""Follow channels through a model's graph, node by node: one rule for each family of operations.

An operation without a rule pins the channels that reach it: they stay, and the summary names the
operation.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from quantize.compression.pruning import moves, rules
from quantize.compression.pruning.labels import Value
from quantize.compression.pruning.trace import Op, Rule, Trace, stored_tensors

POINTWISE = set(
    "dropout alpha_dropout feature_dropout native_dropout to _to_copy type_as hardswish prelu "
    "copy contiguous float "
    "lift_fresh_copy alias detach __and__ __or__ __xor__ logical_not masked_fill gelu rrelu "
    "fill zero zeros_like ones_like "
    "full_like empty_like rand_like randn_like clone where".split()
)
RULES: dict[str, Rule] = {**rules.RULES, **moves.RULES}


def follow(program: torch.export.ExportedProgram, model: nn.Module) -> Trace:
    """The labels of a model after one walk over its graph.

    Args:
        program: exported from a copy of the model.
        model: its parameters and buffers are labelled, a shared one under its first name.
    """
    trace = Trace(model)
    parameters = _parameters(program, model)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in parameters:
            name = parameters[node.name]
            trace.values[node] = Value(tuple(trace.labels.shapes[name]), source=(name, ()))
        elif node.op == "output":
            for value in trace.tensors(node.args):
                trace.labels.pin(value.labels, "it is an output of the model")
        else:
            trace.node = node
            trace.values[node] = _visit(trace, node)
    return trace


def _parameters(program: torch.export.ExportedProgram, model: nn.Module) -> dict[str, str]:
    """The first name of the parameter or buffer that a placeholder stands for, by its name."""
    first = {id(tensor): name for name, tensor in stored_tensors(model).items()}
    every = stored_tensors(model, all_names=True)
    signature = program.graph_signature
    inputs = dict(signature.inputs_to_parameters) | dict(signature.inputs_to_buffers)
    return {
        placeholder: first[id(every[name])] for placeholder, name in inputs.items() if name in every
    }


def _visit(trace: Trace, node: torch.fx.Node) -> Any:
    """What a node gives: a value, or a list of them."""
    out = node.meta.get("val")
    shape = _shape(out)
    first = () if isinstance(shape, list) else shape
    if node.op != "call_function" or not isinstance(out, (Tensor, tuple, list)):
        return Value(first)
    if getattr(node.target, "__name__", "") == "getitem":
        return _item(trace, node, first)
    name = getattr(getattr(node.target, "overloadpacket", None), "__name__", str(node.target))
    base = name if name.startswith("__") else name.rstrip("_")
    why = f"{name} in module {trace.place(node)!r}"
    operands = trace.tensors((node.args, node.kwargs))
    if _depends_on_data(operands, shape):
        return _pinned(trace, operands, shape, why)
    followed = any(value.labels is not None or value.source for value in operands)
    rule = RULES.get(base)
    if rule is not None and (followed or base in rules.SEES_WEIGHTS):
        return rule(Op(trace, node, shape, why))
    if torch.Tag.pointwise in getattr(node.target, "tags", ()) or base in POINTWISE:
        mixed = f"{why} mixes it with data that can't shrink"
        result = trace.labels.elementwise(operands, first, mixed)
        return [result, *map(Value, shape[1:])] if isinstance(shape, list) else result
    return _pinned(trace, operands, shape, why)


def _shape(out: Any) -> tuple[int, ...] | list[tuple[int, ...]]:
    """The shape of a tensor, a list of them for several."""
    if isinstance(out, (tuple, list)):
        return [tuple(part.shape) for part in out if isinstance(part, Tensor)]
    return tuple(out.shape) if isinstance(out, Tensor) else ()


def _item(trace: Trace, node: torch.fx.Node, shape: tuple[int, ...]) -> Any:
    """One of several outputs of another node."""
    source: Any = node.args[0]
    place: Any = node.args[1]
    values = trace.values.get(source)
    return values[place] if isinstance(values, (tuple, list)) else Value(shape)


def _depends_on_data(operands: list[Value], shape: Any) -> bool:
    """Is a size decided by the data: which rows go to an expert, say?

    shape: of the output, or a list of those of several.
    """
    shapes = shape if isinstance(shape, list) else [shape]
    sizes = itertools.chain(*shapes, *(value.shape for value in operands))
    return any(isinstance(size, torch.SymInt) for size in sizes)


def _pinned(trace: Trace, operands: list[Value], shape: Any, why: str) -> Any:
    """All channels that reach the operation stay."""
    for value in operands:
        trace.labels.pin(value.labels, f"{why} can't be followed")
        if value.source:
            trace.pin_parameter(value, f"{why} can't be followed")
    return list(map(Value, shape)) if isinstance(shape, list) else Value(shape)
