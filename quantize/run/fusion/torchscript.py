"""The TorchScript back end, and every `torch.jit` call of this package.

The graph is written out as TorchScript source: no trace, so sizes stay what they were in the model
(free, or fixed and checked), and the file says in readable code what it runs. Weights in a kernel's
own layout can't be stored: the file keeps plain tensors and makes the layout again in
`__setstate__`. The first call runs the graph twice, because TorchScript measures during a graph's
first run and rewrites it before its second: from the second call on there is no surprise.

`torch.jit` warns that it is deprecated in torch 2.15; the warning is silenced here and nowhere
else.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import keyword
import linecache
import math
import operator
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from quantize import surgery
from quantize.run.fusion.edit import is_random
from quantize.run.fusion.graph import Program, aten
from quantize.run.fusion.nested import Spec, duplicate, flatten, numbers, plain, unflatten
from quantize.run.fusion.state import settled


def available() -> bool:
    """Is there TorchScript in this torch?"""
    return hasattr(torch, "jit") and hasattr(torch.jit, "script") and hasattr(torch.jit, "trace")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*", category=Warning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        yield


def load(path: str) -> nn.Module:
    """`torch.jit.load` on the CPU."""
    with _quiet():
        return torch.jit.load(path, map_location="cpu")


def plain_frozen(model: nn.Module, example_inputs: Any) -> nn.Module:
    """What a user of TorchScript does without us: trace and freeze."""
    with _quiet():
        return _trace(model, example_inputs)


def _trace(model: nn.Module, example_inputs: Any) -> nn.Module:
    tensors, spec = flatten(example_inputs, "example_inputs")
    example_inputs = unflatten(spec, duplicate(tensors))  # a forward may write into them
    by_name = isinstance(example_inputs, Mapping)
    inputs = (
        {"example_kwarg_inputs": dict(example_inputs)}
        if by_name
        else {"example_inputs": example_inputs}
    )
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        traced: Any = torch.jit.trace(model, **inputs, strict=False, check_trace=False)
        return torch.jit.freeze(traced.eval())


def _first(error: BaseException) -> str:
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )


def without_export(model: nn.Module, example_inputs: Any, *, reason: str) -> nn.Module:
    """A frozen module for what `torch.export` can't follow (`reason` says why): scripted if it
    compiles, else traced.

    A trace that sees Python decide on a tensor's value is refused with ValueError: it would bake
    the decision in.
    """
    twin = settled(surgery.clone(model)).eval()
    with _quiet(), torch.random.fork_rng(devices=[]):
        try:
            return Fused.of(torch.jit.freeze(torch.jit.script(twin).eval()))
        except Exception:  # TorchScript is a small language; most models are outside it
            pass
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                traced = _trace(twin, example_inputs)
            except Exception as error:
                raise ValueError(
                    f"{type(model).__name__} can't be fused: {reason}; tracing it: {_first(error)}"
                ) from error
    baked = [
        str(w.message).split(". This means")[0]
        for w in caught
        if issubclass(w.category, torch.jit.TracerWarning)
    ]
    if baked:
        raise ValueError(
            f"{type(model).__name__} can't be fused: data-dependent control flow ({reason}); "
            f"{baked[0]}"
        )
    return Fused.of(traced)


class Fused(torch.jit.RecursiveScriptModule):
    """A ScriptModule whose calls return what the model returns: its dataclass, ModelOutput or named
    tuple.

    Its file holds none of those classes: `torch.jit.load` gives a dict of tensors, or a tuple, in
    their place.
    """

    @classmethod
    def of(cls, script: Any, output: Spec | None = None) -> Fused:
        """Make `script` one of this class, in place. `output`: the form of the model's output."""
        script.__class__ = cls
        script.__dict__["_output"] = None if output is None or plain(output) == output else output
        return script

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = super().__call__(*args, **kwargs)
        output = self.__dict__["_output"]
        if output is None:
            return result
        tensors, _ = flatten(result, "the model's output")
        places = numbers(plain(output))  # the file gives some in another order
        return unflatten(output, dict(zip(places, tensors, strict=True)))

    def __deepcopy__(self, memo: dict[int, Any] | None) -> Fused:
        # torch's own deep copy of a module behind an interface shares its tensors
        with _quiet():
            script = torch.jit.load(io.BytesIO(self.save_to_buffer()))
        new: Any = Fused.of(script, self.__dict__["_output"])
        new.__dict__["_notes"] = list(self.__dict__.get("_notes", ()))
        return new

    def __copy__(self) -> Fused:
        return copy.deepcopy(self)


# From graph to source.


def compile(program: Program) -> nn.Module:
    """A ScriptModule that runs `program`; takes the caller's arguments, returns tensors, tuples,
    lists or a dict.
    """
    holder = type(
        "Body", (nn.Module,), {}
    )()  # a class of its own: TorchScript keeps one type per class
    for name in dict.fromkeys(n.target for n in program.graph.nodes if n.op == "get_attr"):
        holder.register_buffer(name, getattr(program.module, name))
    for node in program.graph.nodes:
        if node.meta.get("prepare"):
            setattr(holder, f"prepared_{node.name}", torch.empty(0))
    setattr(holder, "called", False)  # noqa: B010
    writer = _Writer(program)
    with _quiet():
        body = torch.jit.script(holder.eval())
        body.define(writer.body())
        body.prepare()
        outer = type(
            "Fused", (nn.Module,), {"__annotations__": {"body": _interface(writer.interface())}}
        )()
        outer.body = body
        fused = torch.jit.script(outer.eval())
        fused.define(writer.entry())
    return Fused.of(fused, program.output)


def _interface(source: str) -> type:
    """The TorchScript interface that this source declares; TorchScript reads it from a file."""
    name = "fused_interface"
    with tempfile.TemporaryDirectory(prefix="fused-") as folder:
        file = Path(folder) / f"{name}.py"
        file.write_text(source)
        spec: Any = importlib.util.spec_from_file_location(name, file)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            return torch.jit.interface(module.Body)
        finally:
            del sys.modules[name]
            linecache.clearcache()


def source(program: Program) -> str:
    """TorchScript source of what runs: `forward`, and what is made at load."""
    return _Writer(program).body()


def _narrowest(tensor: torch.Tensor) -> torch.dtype:
    """The smallest dtype that holds every value of a float32 tensor: 16-bit weights stay 16-bit in
    the file.
    """
    if tensor.dtype == torch.float32 and tensor.numel() >= 1024:
        for dtype in (torch.float16, torch.bfloat16):
            if torch.equal(tensor.to(dtype).float(), tensor):
                return dtype
    return tensor.dtype


class _Writer:
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
        self.only_prepared = [
            a for a in self.raw if users[a] and all(u.meta.get("prepare") for u in users[a])
        ]

        tensors = {a: getattr(program.module, a) for a in self.raw}
        self.stored = {
            a: t.dtype if a in program.state else _narrowest(t) for a, t in tensors.items()
        }
        self.dtypes = {a: t.dtype for a, t in tensors.items()}
        self.output = plain(program.output)
        self.arguments = [
            (
                _safe(name),
                _type(spec),
                _literal(spec.value) if spec.kind == "constant" and program.keyword else "",
            )
            for name, spec in program.arguments.items()
        ]
        if program.keyword:
            self.arguments.sort(key=lambda a: bool(a[2]))  # those with defaults last

    def body(self) -> str:
        return "\n\n".join([self.forward(), _FIRST, self.prepare(), *self.state()]) + "\n"

    def interface(self) -> str:
        """Methods called through an interface keep an executor of their own, which a first call can
        bring to speed.
        """
        imports = (
            "from typing import Dict, List, Optional, Tuple\n\nimport torch\nfrom torch "
            "import Tensor\n\n\n"
        )
        methods = [
            f"    {self.head(defaults=False)}\n        pass\n",
            "    def first(self) -> bool:\n        pass\n",
        ]
        return imports + "class Body(torch.nn.Module):\n" + "\n".join(methods)

    def entry(self) -> str:
        """TorchScript measures during the first run of a graph and rewrites it for the second: the
        first call does both.

        Not where a second run would go on from other state, other inputs or other random numbers.
        """
        run = f"self.body.forward({', '.join(name for name, _, _ in self.arguments)})"
        if self.once:
            return f"{self.head(defaults=True)}\n    return {run}\n"
        return (
            f"{self.head(defaults=True)}\n    if self.body.first():\n        {run}\n    "
            f"return {run}\n"
        )

    def head(self, *, defaults: bool) -> str:
        parts = [
            f"{n}: {t}" + (f" = {default}" if default and defaults else "")
            for n, t, default in self.arguments
        ]
        return f"def forward({', '.join(['self', *parts])}) -> {_type(self.output)}:"

    def forward(self) -> str:
        checks: list[str] = []
        leaves: dict[int, str] = {}
        for name, spec in self.program.arguments.items():
            self._bind(spec, _safe(name), leaves, checks)
        lines = [self.head(defaults=False), *checks]
        bound: dict[str, str] = {}
        for i, sizes in enumerate(self.program.sizes):
            lines += self._sizes(i, leaves[i], sizes, bound)
        lines += [f"    input_{i} = {leaf}" for i, leaf in leaves.items()]
        for condition in self.program.conditions:
            text = re.sub(r"input_(\d+)", lambda m: leaves[int(m[1])], condition).translate(
                {34: None, 39: None}
            )
            lines.append(
                f'    assert {condition}, "sizes must be so that {text}, as when it was fused"'
            )
        for node in self.program.graph.nodes:
            if node.op == "call_function" and not node.meta.get("prepare"):
                lines.append(f"    {node.name} = {self.call(node)}")
            elif node.op == "output":
                lines.append(
                    f"    return {_build(self.output, [self.value(v) for v in node.args[0]])}"
                )
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

    def _sizes(
        self, index: int, leaf: str, sizes: list[int | str], bound: dict[str, str]
    ) -> list[str]:
        """Refuse other sizes than the graph is good for, rather than answer wrongly."""
        label = leaf.replace('"', "").replace("'", "")
        lines = [
            f'    assert {leaf}.dim() == {len(sizes)}, "{label} must have {len(sizes)} dimensions"'
        ]
        for d, size in enumerate(sizes):
            here = f"{leaf}.size({d})"
            if isinstance(size, int):
                lines.append(
                    f'    assert {here} == {size}, "{label}: dimension {d} must be {size}, as '
                    f'when it was fused"'
                )
            elif size in bound:
                lines.append(
                    f'    assert {here} == {bound[size]}, "{label}: dimension {d} must equal '
                    f'{bound[size]}"'
                )
            elif size.isidentifier():
                bound[size] = here
                if size in self.program.largest:
                    most = self.program.largest[size]
                    lines.append(
                        f'    assert {here} <= {most}, "{label}: dimension {d} must be at most '
                        f'{most}"'
                    )
        return lines

    def prepare(self) -> str:
        lines = ["def prepare(self) -> None:"]
        for node in self.prepared:
            name = node.name if node in self.inner else f"self.prepared_{node.name}"
            lines.append(f"    {name} = {self.call(node)}")
        lines += [f"    self.{a} = torch.empty([0])" for a in self.only_prepared]
        lines += ["    pass"] if len(lines) == 1 else []
        return "\n".join(lines)

    def state(self) -> list[str]:
        kept = []
        for attribute in self.raw:
            back = f"self.{attribute}"
            if attribute in self.only_prepared:
                node = next(
                    n
                    for n in self.prepared
                    if any(a.target == attribute for a in n.all_input_nodes if a.op == "get_attr")
                )
                back = node.meta["prepare"].format(f"self.prepared_{node.name}")
            kept.append(
                back
                if self.stored[attribute] == self.dtypes[attribute]
                else f"{back}.to({self.stored[attribute]})"
            )
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
            if value.op == "get_attr":
                return f"self.{value.target}"
            return (
                f"self.prepared_{value.name}"
                if value.meta.get("prepare") and value not in self.inner
                else value.name
            )
        if isinstance(value, (list, tuple)):
            inner = re.search(r"List\[(.*?)\]+$", kind)
            item = inner.group(1) if inner else ""
            item = item + "]" if item.count("[") > item.count("]") else item
            text = "[" + ", ".join(self.value(v, item) for v in value) + "]"
            return (
                f"torch.jit.annotate(List[{item}], {text})"
                if item and (not value or "Optional" in item)
                else text
            )
        if "float" in kind and isinstance(value, (int, float)) and not isinstance(value, bool):
            return _literal(float(value))
        return _literal(value)

    def call(self, node: fx.Node) -> str:
        target = node.target
        if target in _PYTHON:
            return _PYTHON[target].format(*(self.value(a) for a in node.args))
        if target is aten.sym_size.int:
            return f"{self.value(node.args[0])}.size({node.args[1]})"
        if target is aten.sym_numel.default:
            return f"{self.value(node.args[0])}.numel()"
        if not isinstance(target, torch._ops.OpOverload):
            raise ValueError(f"operator {target} has no TorchScript form")
        schema = target._schema.arguments
        kinds = {a.name: str(a.type) for a in schema}
        parts = []
        for argument, value in zip(schema, node.args, strict=False):
            text = self.value(value, kinds[argument.name])
            parts.append(f"{argument.name}={text}" if argument.kwarg_only else text)
        parts += [f"{name}={self.value(value, kinds[name])}" for name, value in node.kwargs.items()]
        return (
            f"torch.ops.{target.namespace}.{target._schema.name.split('::')[1]}({', '.join(parts)})"
        )


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
    math.ceil: "math.ceil({0})",
    math.floor: "math.floor({0})",
    math.trunc: "int({0})",
    torch.sym_max: "max({0}, {1})",
    torch.sym_min: "min({0}, {1})",
    torch.sym_float: "float({0})",
    torch.sym_int: "int({0})",
    torch.sym_not: "not {0}",
}


def _safe(name: str) -> str:
    name = re.sub(r"\W", "_", name)
    return f"{name}_" if keyword.iskeyword(name) or name in ("self", "torch", "math") else name


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
    return (
        "{" + ", ".join(f"{_literal(k)}: {p}" for k, p in zip(spec.keys, parts, strict=True)) + "}"
    )
