"""A graph as TorchScript source.

Weights in a kernel's own layout can't be stored: the file keeps plain tensors and makes the layout
again in `__setstate__`. The first call runs the graph twice, because TorchScript measures during a
graph's first run and rewrites it before its second: from the second call on there is no surprise.
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from quantize.run.fusion.edit import is_random
from quantize.run.fusion.graph import Program, aten
from quantize.run.fusion.nested import Spec, plain


def _narrowest(tensor: torch.Tensor) -> torch.dtype:
    """The smallest dtype that holds every value of a float32 tensor: 16-bit weights stay 16-bit in
    the file.
    """
    if tensor.dtype == torch.float32 and tensor.numel() >= 1024:
        for dtype in (torch.float16, torch.bfloat16):
            if torch.equal(tensor.to(dtype).float(), tensor):
                return dtype
    return tensor.dtype


def _gives_back(node: fx.Node) -> bool:
    """Can the constant that a prepared value is made of be read from it?"""
    return isinstance(node.meta.get("prepare"), str)


class Writer:
    """TorchScript source of a `Program`: the methods of the body, and of the module around it."""

    def __init__(self, program: Program):
        self.program = program
        nodes = list(program.graph.nodes)
        self.once = bool(program.state) or program.writes_inputs or any(is_random(n) for n in nodes)
        self.prepared = [n for n in nodes if n.meta.get("prepare")]
        self.inner = {n for n in self.prepared if all(u.meta.get("prepare") for u in n.users)}
        self.raw = list(dict.fromkeys(n.target for n in nodes if n.op == "get_attr"))
        users: dict[str, list[fx.Node]] = {}
        for node in nodes:
            if node.op == "get_attr":
                users.setdefault(node.target, []).extend(node.users)
        # those that a file gets back from what was prepared of them
        self.only_prepared = [a for a in self.raw if users[a] and all(map(_gives_back, users[a]))]

        tensors = {a: getattr(program.module, a) for a in self.raw}
        self.dtypes = {a: t.dtype for a, t in tensors.items()}
        narrow = {a: _narrowest(t) for a, t in tensors.items() if a not in program.state}
        self.stored = self.dtypes | narrow
        self.output = plain(program.output)
        self.arguments: list[tuple[str, str, str]] = []  # name, type, default
        for name, spec in program.arguments.items():
            has_default = spec.kind == "constant" and program.keyword
            default = _literal(spec.value) if has_default else ""
            self.arguments.append((_safe(name), _type(spec), default))
        if program.keyword:
            self.arguments.sort(key=lambda a: bool(a[2]))  # those with defaults last

    def body(self) -> str:
        return "\n\n".join([self.forward(), _FIRST, self.prepare(), *self.state()]) + "\n"

    def interface(self) -> str:
        """Methods called through an interface keep an executor of their own, which a first call can
        bring to speed.
        """
        return _INTERFACE.format(self.head(defaults=False))

    def entry(self) -> str:
        """TorchScript measures during the first run of a graph and rewrites it for the second: the
        first call does both.

        Not where a second run would go on from other state, other inputs or other random numbers.
        """
        run = f"self.body.forward({', '.join(name for name, _, _ in self.arguments)})"
        lines = [self.head(defaults=True)]
        if not self.once:
            lines += ["    if self.body.first():", f"        {run}"]
        lines += [f"    return {run}", ""]
        return "\n".join(lines)

    def head(self, *, defaults: bool) -> str:
        parts = ["self"]
        for name, kind, default in self.arguments:
            given = f" = {default}" if default and defaults else ""
            parts.append(f"{name}: {kind}{given}")
        return f"def forward({', '.join(parts)}) -> {_type(self.output)}:"

    def forward(self) -> str:
        checks: list[str] = []
        leaves: dict[int, str] = {}
        for name, spec in self.program.arguments.items():
            self._bind(spec, _safe(name), leaves, checks)
        lines = [self.head(defaults=False), *checks]
        bound: dict[str, str] = {}
        for i, sizes in enumerate(self.program.sizes):
            lines += self._sizes(leaves[i], sizes, bound)
        lines += [f"    input_{i} = {leaf}" for i, leaf in leaves.items()]
        for condition in self.program.conditions:
            text = _unquoted(re.sub(r"input_(\d+)", lambda m: leaves[int(m[1])], condition))
            asked = condition.replace("math.", "torch.ops.aten.")  # TorchScript has no math
            lines.append(
                f'    assert {asked}, "sizes must be so that {text}, as when it was fused"'
            )
        for node in self.program.graph.nodes:
            if node.op == "call_function" and not node.meta.get("prepare"):
                lines.append(f"    {node.name} = {self.call(node)}")
            elif node.op == "output":
                results = [self.value(v) for v in node.args[0]]
                lines.append(f"    return {_build(self.output, results)}")
        return "\n".join(lines)

    def _bind(self, spec: Spec, path: str, leaves: dict[int, str], checks: list[str]) -> None:
        if spec.kind == "tensor":
            leaves[spec.value] = path
        elif spec.kind == "constant":
            test = f"{path} is None" if spec.value is None else f"{path} == {_literal(spec.value)}"
            checks.append(
                f'    assert {test}, "this file was fused with '
                f'{path}={_literal(spec.value)}"'.replace("'", "")
            )
        else:
            keys = [repr(k) for k in spec.keys] or range(len(spec.children))
            for key, child in zip(keys, spec.children, strict=True):
                self._bind(child, f"{path}[{key}]", leaves, checks)

    def _sizes(self, leaf: str, sizes: list[int | str], bound: dict[str, str]) -> list[str]:
        """Refuse other sizes than the graph is good for, rather than answer wrongly."""
        label = _unquoted(leaf)
        dims = len(sizes)
        lines = [f'    assert {leaf}.dim() == {dims}, "{label} must have {dims} dimensions"']
        for d, size in enumerate(sizes):
            here = f"{leaf}.size({d})"
            must = f"{label}: dimension {d} must"
            if isinstance(size, int):
                lines.append(
                    f'    assert {here} == {size}, "{must} be {size}, as when it was fused"'
                )
            elif size in bound:
                lines.append(f'    assert {here} == {bound[size]}, "{must} equal {bound[size]}"')
            elif size.isidentifier():
                bound[size] = here
                most = self.program.largest.get(size)
                if most is not None:
                    lines.append(f'    assert {here} <= {most}, "{must} be at most {most}"')
        return lines

    def prepare(self) -> str:
        lines = ["def prepare(self) -> None:"]
        for node in self.prepared:
            name = node.name if node in self.inner else f"self.prepared_{node.name}"
            lines.append(f"    {name} = {self.call(node)}")
        lines += [f"    self.{a} = torch.empty([0])" for a in self.only_prepared]
        lines += [f"    {line}" for line in self.program.at_load]
        lines += ["    pass"] if len(lines) == 1 else []
        return "\n".join(lines)

    def _stored(self, attribute: str) -> str:
        """A constant as the file keeps it."""
        text = f"self.{attribute}"
        if attribute in self.only_prepared:
            node = next(n for n in self.prepared if _reads(n, attribute))
            text = node.meta["prepare"].format(f"self.prepared_{node.name}")
        if self.stored[attribute] == self.dtypes[attribute]:
            return text
        return f"{text}.to({self.stored[attribute]})"

    def state(self) -> list[str]:
        """`__getstate__` and `__setstate__`."""
        kept = [self._stored(attribute) for attribute in self.raw]
        tensors = f"[{', '.join(kept)}]" if kept else "torch.jit.annotate(List[Tensor], [])"
        get = [
            "def __getstate__(self) -> Tuple[List[Tensor], bool]:",
            f"    return ({tensors}, self.training)",
        ]
        put = ["def __setstate__(self, state: Tuple[List[Tensor], bool]) -> None:"]
        put += [
            f"    self.{a} = state[0][{i}].to({self.dtypes[a]})" for i, a in enumerate(self.raw)
        ]
        put += ["    self.training = state[1]", "    self.called = False", "    self.prepare()"]
        return ["\n".join(get), "\n".join(put)]

    def value(self, value: Any, kind: str = "") -> str:
        """An argument as source; `kind` is its type in the operator's schema."""
        if isinstance(value, fx.Node):
            return self._name(value)
        if isinstance(value, (list, tuple)):
            return self._list(value, kind)
        if "float" in kind and isinstance(value, (int, float)) and not isinstance(value, bool):
            return _literal(float(value))
        return _literal(value)

    def _name(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            return f"self.{node.target}"
        attribute = node.meta.get("prepare") and node not in self.inner
        return f"self.prepared_{node.name}" if attribute else node.name

    def _list(self, values: Sequence[Any], kind: str) -> str:
        """A list as source, with its type where TorchScript couldn't tell it."""
        inner = re.search(r"List\[(.*?)\]+$", kind)
        item = inner.group(1) if inner else ""
        if item.count("[") > item.count("]"):
            item += "]"
        text = f"[{', '.join(self.value(value, item) for value in values)}]"
        if item and (not values or "Optional" in item):
            return f"torch.jit.annotate(List[{item}], {text})"
        return text

    def call(self, node: fx.Node) -> str:
        target = node.target
        if target is operator.pow and isinstance(node.meta.get("val"), (int, torch.SymInt)):
            base, exponent = map(self.value, node.args)  # a float in TorchScript
            return f"int({base} ** {exponent})"
        if target in _PYTHON:
            return _PYTHON[target].format(*(self.value(a) for a in node.args))
        if target is aten.sym_size.int:
            return f"{self.value(node.args[0])}.size({node.args[1]})"
        if target is aten.sym_numel.default:
            return f"{self.value(node.args[0])}.numel()"
        if not isinstance(target, torch._ops.OpOverload):
            name = getattr(target, "__name__", target)
            raise ValueError(f"operator {name} has no TorchScript form")
        schema = target._schema.arguments
        kinds = {a.name: str(a.type) for a in schema}
        parts = []
        for argument, value in zip(schema, node.args, strict=False):
            text = self.value(value, kinds[argument.name])
            parts.append(f"{argument.name}={text}" if argument.kwarg_only else text)
        parts += [f"{name}={self.value(value, kinds[name])}" for name, value in node.kwargs.items()]
        name = target._schema.name.split("::")[1]
        return f"torch.ops.{target.namespace}.{name}({', '.join(parts)})"


_INTERFACE = """from typing import Dict, List, Optional, Tuple

import torch
from torch import Tensor


class Body(torch.nn.Module):
    {}
        pass

    def first(self) -> bool:
        pass
"""
_FIRST = """def first(self) -> bool:
    called = self.called
    self.called = True
    return not called"""

_PYTHON = {
    operator.getitem: "{0}[{1}]",
    operator.add: "{0} + {1}",
    operator.sub: "{0} - {1}",
    operator.mul: "{0} * {1}",
    operator.floordiv: "{0} // {1}",
    operator.truediv: "{0} / {1}",
    operator.mod: "{0} % {1}",
    operator.pow: "{0} ** {1}",
    operator.neg: "-{0}",
    operator.eq: "{0} == {1}",
    operator.ne: "{0} != {1}",
    operator.lt: "{0} < {1}",
    operator.le: "{0} <= {1}",
    operator.gt: "{0} > {1}",
    operator.ge: "{0} >= {1}",
    math.ceil: "torch.ops.aten.ceil({0})",
    math.floor: "torch.ops.aten.floor({0})",
    math.trunc: "int({0})",
    torch.sym_max: "max({0}, {1})",
    torch.sym_min: "min({0}, {1})",
    torch.sym_float: "float({0})",
    torch.sym_int: "int({0})",
    torch.sym_not: "not {0}",
    torch.sym_ite: "({1} if {0} else {2})",
}


def _safe(name: str) -> str:
    name = re.sub(r"\W", "_", name)
    return f"{name}_" if keyword.iskeyword(name) or name in ("self", "torch", "math") else name


def _unquoted(text: str) -> str:
    """For use within a message, which stands in quotes."""
    return text.replace('"', "").replace("'", "")


def _reads(node: fx.Node, attribute: str) -> bool:
    constants = [a for a in node.all_input_nodes if a.op == "get_attr"]
    return any(constant.target == attribute for constant in constants)


def _literal(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if value is None or isinstance(
        value, (bool, int, float, torch.dtype, torch.layout, torch.memory_format)
    ):
        return str(value)
    raise ValueError(f"constant {value!r} has no TorchScript form")


def _type(spec: Spec) -> str:
    if spec.kind == "tensor":
        return "Tensor"
    if spec.kind == "constant":
        return "Optional[Tensor]" if spec.value is None else type(spec.value).__name__
    inner = [_type(c) for c in spec.children]
    if spec.kind == "tuple":
        return f"Tuple[{', '.join(inner)}]" if inner else "Tuple[()]"
    if len(set(inner)) > 1:
        raise TypeError(
            f"a {spec.kind} of {sorted(set(inner))} has no TorchScript type: use a tuple"
        )
    item = inner[0] if inner else "Tensor"
    return f"List[{item}]" if spec.kind == "list" else f"Dict[str, {item}]"


def _build(spec: Spec, values: list[str]) -> str:
    if spec.kind == "tensor":
        return values[spec.value]
    if spec.kind == "constant":
        return _literal(spec.value)
    parts = [_build(c, values) for c in spec.children]
    if spec.kind == "tuple":
        return f"({', '.join(parts)},)"
    if spec.kind == "list":
        return f"[{', '.join(parts)}]"
    pairs = [f"{_literal(key)}: {part}" for key, part in zip(spec.keys, parts, strict=True)]
    return f"{{{', '.join(pairs)}}}"
