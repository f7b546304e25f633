"""The TorchScript back end, and every `torch.jit` call of this package.

The graph is written out as TorchScript source (writer.py): no trace, so sizes stay what they were
in the model (free, or fixed and checked), and the file says in readable code what it runs.

`torch.jit` warns that it is deprecated in torch 2.15; the warning is silenced here and nowhere
else.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import linecache
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantize import surgery
from quantize.run.fusion.graph import Program, lines_of
from quantize.run.fusion.nested import Spec, duplicate, flatten, numbers, plain, unflatten
from quantize.run.fusion.state import settled
from quantize.run.fusion.writer import Writer


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


def succeeds(trial: Sequence[str]) -> bool:
    """Do these lines of TorchScript run, and find `exact` true?"""
    lines = ["def run() -> bool:", *trial, "return exact"]
    try:
        with _quiet():
            return torch.jit.CompilationUnit("\n    ".join(lines) + "\n").run()
    except (RuntimeError, AttributeError):
        return False


def plain_frozen(model: nn.Module, example_inputs: Any) -> nn.Module:
    """What a user of TorchScript does without us: trace and freeze."""
    with _quiet():
        return _trace(model, example_inputs)


def _trace(model: nn.Module, example_inputs: Any) -> nn.Module:
    tensors, spec = flatten(example_inputs, "example_inputs")
    example_inputs = unflatten(spec, duplicate(tensors))  # a forward may write into them
    by_name = isinstance(example_inputs, Mapping)
    kind = "example_kwarg_inputs" if by_name else "example_inputs"
    inputs: dict[str, Any] = {kind: dict(example_inputs) if by_name else example_inputs}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        traced: Any = torch.jit.trace(model, **inputs, strict=False, check_trace=False)
        return torch.jit.freeze(traced.eval())


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
                reason = f"{reason}; tracing it: {lines_of(error)[0]}"
                raise ValueError(f"{type(model).__name__} can't be fused: {reason}") from error
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
    # A class of its own: TorchScript keeps one type per class.
    holder = type("Body", (nn.Module,), {})()
    for name in dict.fromkeys(n.target for n in program.graph.nodes if n.op == "get_attr"):
        holder.register_buffer(name, getattr(program.module, name))
    writer = Writer(program)
    for node in writer.prepared:
        if node not in writer.inner:
            setattr(holder, f"prepared_{node.name}", torch.empty(0))
    setattr(holder, "called", False)  # noqa: B010
    with _quiet():
        body = torch.jit.script(holder.eval())
        body.define(writer.body())
        body.prepare()
        annotations = {"body": _interface(writer.interface())}
        outer = type("Fused", (nn.Module,), {"__annotations__": annotations})()
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
