"""The model as a flat graph of aten operators on tensors, taken by `torch.export`, with the facts the passes need.

Left out: training, data-dependent control flow and models that change their own buffers: each is refused by name.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import keyword
import logging
import math
import operator
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn

from quantize import surgery
from quantize.fusion.nested import Spec, flatten, unflatten

aten = torch.ops.aten


class CaptureError(ValueError):
    """`torch.export` can't follow this model; the message says why."""


@dataclass
class Program:
    """A graph over flat tensors (placeholders), constants (`get_attr`) and operators, and how callers see it."""

    module: fx.GraphModule
    arguments: dict[str, Spec]  # the caller's arguments by name, in order
    keyword: bool  # the caller passes them by name
    output: Spec
    sizes: list[list[int | str]]  # per tensor and dimension: a fixed size, or the name of a size that varies
    largest: dict[str, int] = field(default_factory=dict)  # varying sizes that have an upper bound
    conditions: list[str] = field(default_factory=list)  # on `input_0.size(1)` and so on: where the export took a decision
    widened: int = 1  # 2 if a batch of one was doubled for the export: hints about sizes are too large by this
    notes: list[str] = field(default_factory=list)  # what the passes did, for people

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def copy(self) -> Program:
        """The same program with a graph of its own; the tensors are shared."""
        module, graph = nn.Module(), fx.Graph()
        for name, tensor in self.module.named_buffers():
            module.register_buffer(name, tensor)
        graph.output(graph.graph_copy(self.graph, {}))
        return replace(self, module=fx.GraphModule(module, graph), notes=[*self.notes])

    def operators(self) -> Counter[str]:
        """How many operators of each kind run per call; what is prepared at load is not counted."""
        nodes = [n for n in self.graph.nodes if n.op == "call_function" and not n.meta.get("prepare")]
        return Counter(str(n.target).removesuffix(".default") for n in nodes if isinstance(n.target, torch._ops.OpOverload))


def check_inputs(model: nn.Module, example_inputs: Any) -> None:
    """Raise ValueError or TypeError for a model in training mode, a model off the CPU, or inputs that don't fit it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if any(k.__name__ == "ScriptModule" for k in type(model).__mro__):
        raise TypeError("model is already a TorchScript module: fuse the nn.Module it was made from")
    for name, module in model.named_modules():
        if module.training:
            where = f"module {name!r} ({type(module).__name__})" if name else f"model ({type(module).__name__})"
            raise ValueError(f"{where} is in training mode; fusing needs eval mode: call model.eval() first")
    tensors, _ = flatten(example_inputs, "example_inputs")
    if not tensors:
        raise ValueError("example_inputs has no tensor in it")
    own = {t.device for t in [*model.parameters(), *model.buffers()]}
    if len(own) > 1:
        raise ValueError(f"the model is spread over {sorted(map(str, own))}: move it to one device before fusing")
    for i, tensor in enumerate(tensors):
        if own and tensor.device not in own:
            device = next(iter(own))
            raise ValueError(f"tensor {i} of example_inputs is on {tensor.device} and the model on {device}: move one of them")


def named_arguments(model: nn.Module, example_inputs: Any) -> tuple[dict[str, Any], bool]:
    """The example inputs by the parameter names of `model.forward`, and whether the caller passes them by name."""
    parameters = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if isinstance(example_inputs, Mapping):
        order = {name: i for i, name in enumerate(parameters)}
        return dict(sorted(example_inputs.items(), key=lambda kv: order.get(kv[0], len(order)))), True
    values = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    names = parameters[: len(values)] + [f"argument_{i}" for i in range(len(parameters), len(values))]
    return dict(zip(names, values, strict=True)), False


class Flat(nn.Module):
    """`model` with flat tensors in and out; remembers how the output is put back together."""

    def __init__(self, model: nn.Module, spec: Spec, keyword: bool):
        super().__init__()
        self.model, self.spec, self.keyword = model, spec, keyword
        self.seen = SimpleNamespace(output=None)  # torch.export restores plain attributes

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        arguments = unflatten(self.spec, tensors)
        result = self.model(**arguments) if self.keyword else self.model(*arguments.values())
        flat, self.seen.output = flatten(result, "the model's output")
        return tuple(flat)


def wider(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """A batch of one becomes a batch of two, so that `torch.export` doesn't take the 1 for a fixed size."""
    if all(t.dim() and t.shape[0] == 1 for t in tensors):
        return [torch.cat([t, t]) for t in tensors]
    return tensors


def capture(model: nn.Module, example_inputs: Any) -> Program:
    """Export a copy of `model` with every size that can vary left free. Raises `CaptureError`; the model stays as it is."""
    named, keyword = named_arguments(model, example_inputs)
    tensors, spec = flatten(named, "example_inputs")
    flat = Flat(surgery.clone(model), spec, keyword).eval()
    try:
        exported, used = _export(flat, tensors, free=lambda dim: True)
    except _TooManyDecisions:  # its Python computes with sizes all the way: let the batch vary alone
        exported, used = _export(flat, tensors, free=lambda dim: dim == 0)
    program = _program(exported, flat, dict(zip(named, spec.children, strict=True)), keyword, [t.shape for t in used])
    program.widened = 1 if used is tensors else 2
    return program


class _TooManyDecisions(Exception):
    """Most models take less than 40 decisions on sizes; solving for a hundred takes torch.export minutes."""

    LIMIT = 60


def _export(flat: Flat, tensors: list[torch.Tensor], *, free: Callable[[int], bool]) -> tuple[Any, list[torch.Tensor]]:
    """The exported program and the inputs it was traced with; `free` says which dimensions may vary."""

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mode = torch._guards.detect_fake_mode([*args, *kwargs.values()])
        if mode is not None and mode.shape_env is not None and len(mode.shape_env.guards) > _TooManyDecisions.LIMIT:
            raise _TooManyDecisions

    auto, fixed = torch.export.Dim.AUTO, torch.export.Dim.STATIC
    handles = [m.register_forward_pre_hook(count, with_kwargs=True) for m in flat.modules() if free(1)]
    errors = []
    try:
        for candidate in [wider(tensors), tensors] if wider(tensors) is not tensors else [tensors]:
            dynamic = tuple(tuple(auto if free(d) else fixed for d in range(t.dim())) for t in candidate)
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=[]), _silent():
                    exported = torch.export.export(flat, tuple(candidate), dynamic_shapes=(dynamic,), strict=False)
            except _TooManyDecisions:
                raise
            except TypeError as error:
                raise CaptureError(str(error).splitlines()[0]) from error
            except Exception as error:  # torch.export raises many kinds; all mean that it can't follow the model
                errors.append(f"{type(error).__name__}: {_first_line(error)}")
                continue
            if free(1) and len(exported._guards_code) > _TooManyDecisions.LIMIT:
                raise _TooManyDecisions
            return exported, candidate
    finally:
        for handle in handles:
            handle.remove()
    raise CaptureError(errors[-1])


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """`torch.export` prints the graph so far when it can't go on, beside raising."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no message"


def _program(exported: Any, flat: Flat, arguments: dict[str, Spec], keyword: bool, shapes: Sequence[Sequence[int]]) -> Program:
    signature, source = exported.graph_signature, exported.graph_module
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
        raise CaptureError(f"its forward changes {', '.join(changed)} in place")
    attributes = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors = {**dict(flat.named_parameters(remove_duplicate=False)), **dict(flat.named_buffers(remove_duplicate=False))}
    tensors |= {n: c for n, c in exported.constants.items() if isinstance(c, torch.Tensor)}
    module, graph = nn.Module(), fx.Graph()
    known: dict[int, str] = {}  # tied weights stay one tensor
    taken: dict[str, fx.Node] = {}
    values: dict[fx.Node, Any] = {}
    sizes: list[list[int | str]] = []

    def constant(name: str, tensor: torch.Tensor) -> fx.Node:
        key = known.get(id(tensor)) or _attribute(name.removeprefix("model."))
        while id(tensor) not in known and key in taken:
            key += "_"
        known[id(tensor)] = key
        if key not in taken:
            module.register_buffer(key, tensor.detach())
            taken[key] = graph.get_attr(key)
        return taken[key]

    def inline(source: fx.GraphModule, node: fx.Node) -> Any:
        """Copy one node, opening the blocks that only set a mode which is already set."""
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            name = node.target.name()
            opened = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}.get(name)
            if opened is None or (name == "wrap_with_autocast" and node.args[2]):
                raise CaptureError(f"it uses {name}, data-dependent control flow or a mode that can't be fused")
            inner = getattr(source, node.args[opened].target)
            inputs = iter([fx.node.map_arg(a, lambda n: values[n]) for a in node.args[opened + 1 :]])
            for child in inner.graph.nodes:
                if child.op == "placeholder":
                    values[child] = next(inputs)
                elif child.op == "output":
                    return fx.node.map_arg(child.args[0], lambda n: values[n])
                elif child.op != "get_attr" or isinstance(getattr(inner, child.target), torch.Tensor):
                    values[child] = inline(inner, child)
            raise AssertionError("a graph without an output")
        if node.op == "get_attr":
            return constant(f"{node.target}_{len(taken)}", getattr(source, node.target))
        if node.target is operator.getitem and not isinstance(values[node.args[0]], fx.Node):
            return values[node.args[0]][node.args[1]]
        return graph.node_copy(node, lambda n: values[n])

    for node in source.graph.nodes:
        if node.op == "placeholder" and node.name in attributes:
            values[node] = constant(attributes[node.name], tensors[attributes[node.name]])
        elif node.op == "placeholder":
            values[node] = graph.placeholder(f"input_{len(sizes)}")
            values[node].meta = dict(node.meta)
            sizes.append([int(str(s)) if str(s).isdigit() else str(s) for s in node.meta["val"].shape])
        elif node.op == "output":
            graph.output(tuple(fx.node.map_arg(node.args[0], lambda n: values[n])))
        elif node.op == "get_attr" and not isinstance(getattr(source, node.target), torch.Tensor):
            continue
        elif node.target in _CHECKS:
            continue
        else:
            values[node] = inline(source, node)
    for node in graph.nodes:
        if is_in_place(node):
            root = node.args[0]
            while isinstance(root, fx.Node) and root.op == "call_function" and root.args and not _makes_new(root):
                root = root.args[0]
            if isinstance(root, fx.Node) and root.op == "get_attr":
                raise CaptureError(f"its forward changes {root.target} in place")
    largest = {}
    for symbol, bounds in exported.range_constraints.items():
        if str(bounds.upper).isdigit() and int(bounds.upper) < 2**31:  # else it is one of sympy's infinities
            largest[str(symbol)] = int(bounds.upper)
    program = Program(fx.GraphModule(module, graph), arguments, keyword, flat.seen.output, sizes, largest)
    program.conditions = _conditions(exported, shapes)
    return program


def holds(condition: str, shapes: Sequence[Sequence[int]]) -> bool:
    """Is a condition of `Program.conditions` true for inputs of these shapes?"""
    inputs = {f"input_{i}": SimpleNamespace(size=list(shape).__getitem__) for i, shape in enumerate(shapes)}
    return bool(eval(condition, {"math": math, "min": min, "max": max, **inputs}))  # text written by torch.export's printer


def _conditions(exported: Any, shapes: Sequence[Sequence[int]]) -> list[str]:
    """What the model's Python asked of sizes on its way, as far as another answer would have led another way.

    Left out: what `Program.sizes` and `largest` say, comparisons of strides, and the questions that torch itself asks of every
    size, whether it is 0 or 1. A batch of one is never excluded: `equality.check` tries it.
    """
    one = [[1, *shape[1:]] for shape in shapes]
    found: dict[str, None] = {}
    for text in exported._guards_code:
        text = re.sub(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]", r"input_\1.size(\2)", text)
        text = text.replace("torch.sym_min", "min").replace("torch.sym_max", "max")
        left, compared, right = text.partition(next((c for c in (" == ", " <= ", " >= ", " < ", " > ") if c in text), "?"))
        simple = "(" not in left.replace(".size(", "") and "(" not in right.replace(".size(", "")
        ordered = compared != " == " and "input" in left and "input" in right
        noise = compared in (" >= ", " > ") and right in ("0", "1", "2")
        if not compared or ordered or noise or (simple and compared in (" == ", " <= ")):
            continue
        words = set(re.findall(r"[A-Za-z_][\w.]*", re.sub(r"input_\d+\.size", "", text)))
        if words <= {"min", "max", "math.ceil", "math.floor"} and holds(text, shapes) and holds(text, one):
            found[text] = None
    return list(found)


def _attribute(name: str) -> str:
    """`layers.0.weight` as a Python name."""
    name = re.sub(r"\W", "_", name.replace(".", "__"))
    return name if name.isidentifier() and not keyword.iskeyword(name) else f"_{name}"


def is_in_place(node: fx.Node) -> bool:
    """Does this operator write into one of its arguments?"""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _makes_new(node: fx.Node) -> bool:
    """Does this operator's result have memory of its own, for certain?"""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and not any(r.alias_info for r in schema.returns) and node.target is not aten.reshape.default


_CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}
