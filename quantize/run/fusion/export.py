"""From a model to a `Program`: `torch.export` traces a copy of it, and the importer makes one flat
graph of what comes out.

State that the forward writes in place or assigns (buffers, tensors in attributes) becomes constants
that the graph writes into, operator by operator as the model did. Left out: training,
data-dependent control flow, and state that changes its shape: each is refused by name.
"""

from __future__ import annotations

import contextlib
import io
import keyword as python
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch.fx.node import map_arg

from quantize import surgery
from quantize.run.fusion.edit import argument, may_be_view
from quantize.run.fusion.graph import CaptureError, Program, aten, is_in_place, named_arguments
from quantize.run.fusion.nested import Spec, flatten, unflatten
from quantize.run.fusion.sizes import conditions
from quantize.run.fusion.state import settled


class Flat(nn.Module):
    """`model` with flat tensors in and out: the outputs, and after them the buffers that the
    forward assigned anew.

    `seen` remembers how the output is put back together, and the names of those buffers.
    """

    def __init__(self, model: nn.Module, spec: Spec, keyword: bool):
        super().__init__()
        self.model, self.spec, self.keyword = model, spec, keyword
        self.seen = SimpleNamespace(
            output=None, assigned=[]
        )  # torch.export restores plain attributes

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        before = [(name, module, dict(module._buffers)) for name, module in self.named_modules()]
        arguments = unflatten(self.spec, tensors)
        result = self.model(**arguments) if self.keyword else self.model(*arguments.values())
        flat, self.seen.output = flatten(result, "the model's output")
        self.seen.assigned = []
        for name, module, buffers in before:
            for key in [k for k, buffer in buffers.items() if module._buffers.get(k) is not buffer]:
                value = module._buffers.get(key)
                if not isinstance(value, torch.Tensor) or buffers[key] is None:
                    raise CaptureError(
                        f"its forward makes or removes the buffer "
                        f"{name.removeprefix('model.')}.{key}"
                    )
                self.seen.assigned.append(f"{name}.{key}")
                flat.append(value)
                module._buffers[key] = buffers[key]
        return tuple(flat)


def capture(model: nn.Module, example_inputs: Any, changed: Sequence[str] = ()) -> Program:
    """Export a copy of `model` with every size that can vary left free; the model stays as it is.

    Args:
        changed: names of the attributes that a forward changes, as `state.answers` gives them:
            tensors among them are carried.

    Raises:
        CaptureError: `torch.export` can't follow the model, or its state can't be carried; the
            message says why.
    """
    named, keyword = named_arguments(model, example_inputs)
    tensors, spec = flatten(named, "example_inputs")

    def fresh() -> Flat:
        """A copy for each try: tracing runs the model's Python, which may leave something
        behind.
        """
        return Flat(
            _with_state_in_buffers(settled(surgery.clone(model)), changed), spec, keyword
        ).eval()

    arguments = dict(zip(named, spec.children, strict=True))
    for free in _FREE[:-1]:
        try:
            return _program(fresh, tensors, free, arguments, keyword)
        except _TooFree:
            continue
    return _program(fresh, tensors, _FREE[-1], arguments, keyword)


def _program(
    fresh: Callable[[], Flat],
    tensors: list[torch.Tensor],
    free: Callable[[int], bool],
    arguments: dict[str, Spec],
    keyword: bool,
) -> Program:
    exported, flat, used = _export(fresh, tensors, free=free)
    program = _Importer(exported, flat).program(arguments, keyword, [t.shape for t in used])
    program.widened = 1 if used is tensors else 2
    _drop_dead_writes(program)
    _find_state(program)
    return program


def _with_state_in_buffers(model: nn.Module, changed: Sequence[str]) -> nn.Module:
    """Tensors in plain attributes that a forward changes become buffers, in place: torch.export
    follows those.
    """
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for key, value in list(module.__dict__.items()):
            if prefix + key in changed and isinstance(value, torch.Tensor):
                del module.__dict__[key]
                module.register_buffer(key, value.detach(), persistent=False)
    return model


class _TooFree(CaptureError):
    """Fewer sizes have to be free: the model's Python computes with them all the way, or state
    depends on them.
    """


# Which dimensions may vary: all, the batch, none.
_FREE: tuple[Callable[[int], bool], ...] = (
    lambda dim: True,
    lambda dim: dim == 0,
    lambda dim: False,
)

# Most models take less than 40 decisions on sizes; solving for a hundred takes torch.export
# minutes.
_MOST_DECISIONS = 60


def _wider(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """A batch of one becomes a batch of two, so that `torch.export` doesn't take the 1 for a fixed
    size.
    """
    if all(t.dim() and t.shape[0] == 1 for t in tensors):
        return [torch.cat([t, t]) for t in tensors]
    return tensors


def _export(
    fresh: Callable[[], Flat], tensors: list[torch.Tensor], *, free: Callable[[int], bool]
) -> tuple[Any, Flat, list[torch.Tensor]]:
    """The exported program, the module and the inputs it was traced with; `free` says which
    dimensions may vary.
    """
    wide = _wider(tensors)
    errors = []
    for candidate in [wide, tensors] if wide is not tensors else [tensors]:
        flat = fresh()
        try:
            exported = _traced(flat, candidate, free)
            if candidate is tensors or not _fixes_batch(exported):
                return exported, flat, candidate
            errors.append("its batch can't vary")
        except _TooFree:
            raise
        except TypeError as error:
            raise CaptureError(str(error).splitlines()[0]) from error
        except (
            Exception
        ) as error:  # torch.export raises many kinds; all mean that it can't follow the model
            errors.append(f"{type(error).__name__}: {_first_line(error)}")
    raise CaptureError(errors[-1])


def _fixes_batch(exported: Any) -> bool:
    """Did the export find out that the model takes no other batch than that of the example?"""
    inputs = exported.graph_signature.user_inputs
    values = [
        n.meta["val"]
        for n in exported.graph_module.graph.nodes
        if n.op == "placeholder" and n.name in inputs
    ]
    return any(str(v.shape[0]).isdigit() for v in values)


def _traced(flat: Flat, tensors: list[torch.Tensor], free: Callable[[int], bool]) -> Any:
    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mode = detect_fake_mode([*args, *kwargs.values()])
        if (
            mode is not None
            and mode.shape_env is not None
            and len(mode.shape_env.guards) > _MOST_DECISIONS
        ):
            raise _TooFree("too many decisions on sizes")

    auto, fixed = torch.export.Dim.AUTO, torch.export.Dim.STATIC
    dynamic = tuple(tuple(auto if free(d) else fixed for d in range(t.dim())) for t in tensors)
    handles = [
        m.register_forward_pre_hook(count, with_kwargs=True) for m in flat.modules() if free(1)
    ]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _silent():
            exported = torch.export.export(
                flat, tuple(tensors), dynamic_shapes=(dynamic,), strict=False
            )
    finally:
        for handle in handles:
            handle.remove()
    if free(1) and len(exported._guards_code) > _MOST_DECISIONS:
        raise _TooFree("too many decisions on sizes")
    return exported


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


class _Importer:
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
                self.values[node] = self._constant(names[node.name], tensors[names[node.name]])
            elif node.op == "placeholder":
                self.values[node] = self._placeholder(node)
            elif node.op == "output":
                self._output(
                    [self.values[v] if isinstance(v, fx.Node) else v for v in node.args[0]], tensors
                )
            elif node.op == "get_attr" and not isinstance(
                getattr(source, node.target), torch.Tensor
            ):
                continue  # a block, opened where it is called
            elif node.target in _CHECKS:
                continue
            else:
                self.values[node] = self._inline(source, node)
        made = fx.GraphModule(self.module, self.graph)
        program = Program(
            made, arguments, keyword, self.flat.seen.output, self.sizes, self._largest()
        )
        program.conditions, program.doubtful = conditions(self.exported, shapes)
        return program

    def _output(self, values: list[Any], tensors: dict[str, torch.Tensor]) -> None:
        """Outputs; what was assigned to buffers is copied into them first, all of it as it was
        before the first copy.
        """
        count = len(values) - len(self.flat.seen.assigned)
        assigned = [
            v if root_of(v).op == "call_function" else self._clone(v) for v in values[count:]
        ]
        for name, value in zip(self.flat.seen.assigned, assigned, strict=True):
            state = self._constant(name, tensors[name])
            _check_assigned(name.removeprefix("model."), tensors[name], value.meta["val"])
            self.graph.call_function(aten.copy_.default, (state, value)).meta["assigned"] = True
        self.graph.output(tuple(values[:count]))

    def _clone(self, value: fx.Node) -> fx.Node:
        copy = self.graph.call_function(aten.clone.default, (value,))
        copy.meta["val"] = value.meta["val"]
        return copy

    def _attributes(self) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
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
        tensors |= {n: c for n, c in self.exported.constants.items() if isinstance(c, torch.Tensor)}
        return names, tensors

    def _largest(self) -> dict[str, int]:
        bounds = {
            str(symbol): str(b.upper) for symbol, b in self.exported.range_constraints.items()
        }
        return {
            s: int(upper) for s, upper in bounds.items() if upper.isdigit() and int(upper) < 2**31
        }  # else: infinity

    def _value(self, node: fx.Node) -> Any:
        return self.values[node]

    def _placeholder(self, node: fx.Node) -> fx.Node:
        new = self.graph.placeholder(f"input_{len(self.sizes)}")
        new.meta = dict(node.meta)
        self.sizes.append(
            [int(str(s)) if str(s).isdigit() else str(s) for s in node.meta["val"].shape]
        )
        return new

    def _constant(self, name: str, tensor: torch.Tensor) -> fx.Node:
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
            elif child.op != "get_attr" or isinstance(getattr(inner, child.target), torch.Tensor):
                self.values[child] = self._inline(inner, child)
        raise AssertionError("a graph without an output")


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


# State.


def _drop_dead_writes(program: Program) -> None:
    """Remove writes into a constant that nothing reads: statistics for people, activations kept in
    a buffer.
    """
    for constant in program.graph.find_nodes(op="get_attr"):
        writes = list(constant.users)
        only = all(is_in_place(u) and not u.users and u.args[0] is constant for u in writes)
        alone = only and all(list(u.all_input_nodes).count(constant) == 1 for u in writes)
        if alone:
            for write in writes:
                program.graph.erase_node(write)
            program.graph.erase_node(constant)


def _find_state(program: Program) -> None:
    """Note which constants and whether inputs are written into; outputs that share memory with such
    a constant are copied.
    """
    for node in list(program.graph.nodes):
        if node.op != "call_function" or not is_in_place(node):
            continue
        root = root_of(node.args[0])
        if root.op == "placeholder":
            program.writes_inputs = True
        elif root.op == "get_attr":
            name = str(root.target)
            if name not in program.state:
                program.state[name] = getattr(program.module, name).clone()
    if program.state:
        _copy_returned_state(program)


def _check_assigned(name: str, before: torch.Tensor, after: torch.Tensor) -> None:
    """A buffer that is assigned anew is copied into: right only if it keeps its shape and dtype."""
    sizes = [_known(size) for size in after.shape]
    if sizes != list(before.shape) or after.dtype != before.dtype:
        shapes = f"{sizes} of {after.dtype} where it was {list(before.shape)} of {before.dtype}"
        raise _TooFree(f"its forward assigns to {name} a tensor of other shape or dtype: {shapes}")


def _known(size: int | torch.SymInt) -> int | str:
    """A size that the export found out to be fixed is a number."""
    number = size if isinstance(size, int) else size.node.maybe_as_int()
    return str(size) if number is None else number


def _copy_returned_state(program: Program) -> None:
    """What is returned must keep its value at the next call; what was assigned last must not show
    in what was returned.
    """
    *_, output = program.graph.nodes
    place = next((n for n in program.graph.nodes if n.meta.get("assigned")), output)
    for node in dict.fromkeys(n for n in output.all_input_nodes if root_of(n).op == "get_attr"):
        if root_of(node).target not in program.state:
            continue
        with program.graph.inserting_before(place):
            copy = program.graph.call_function(aten.clone.default, (node,))
        copy.meta["val"] = node.meta.get("val")
        output.replace_input_with(node, copy)


def root_of(node: Any) -> fx.Node:
    """The node whose memory this one may show: follow views and writes in place back to where they
    began.
    """
    while node.all_input_nodes and may_be_view(node):
        node = node.all_input_nodes[0]
    return node
