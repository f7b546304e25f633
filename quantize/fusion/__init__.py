"""Fusion: the fastest equal model. `fold` runs our own passes, `fuse` hands the result to a back end and gives its file.

The model becomes a graph of operators (graph.py), which loses what inference doesn't need (passes.py, folding.py), gets
cheaper operators for the same values (cheaper.py), oneDNN kernels that do a convolution or linear layer, its activation and
the residual add in one go (kernels.py), and results in memory that nobody reads any more (memory.py). torchscript.py writes
the graph out as TorchScript, folded.py runs it in Python, backends.py gives it to other engines. Each result is compared with
the model before it is returned (equality.py), and of several ways the fastest is taken (planning.py).

Left out: training, kernels for GPUs, and models that decide on the data which way to go, unless TorchScript can compile them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from quantize.fusion import backends, torchscript
from quantize.fusion.equality import check, race
from quantize.fusion.graph import CaptureError, capture, check_inputs
from quantize.fusion.nested import flatten
from quantize.fusion.passes import simplify
from quantize.fusion.planning import Plan, fold, plan

__all__ = ["BACKENDS", "CaptureError", "Contender", "Plan", "compare", "fold", "fuse", "plan"]

BACKENDS = ("torchscript", "inductor", "onnxruntime", "openvino")


@dataclass
class Contender:
    """One back end in `compare`."""

    backend: str
    model: nn.Module | None = None
    latency_ms: float | None = None  # median per call
    difference: float | None = None  # largest, relative to the largest output value
    reason: str = ""  # why it is out
    plan: Plan | None = None  # what the passes did (TorchScript)


def fuse(model: nn.Module, example_inputs: Any, *, backend: str = "torchscript") -> nn.Module:
    """A fused version of an eval-mode model: called like the model, equal to it, with `.save(path)`.

    `example_inputs` is a tensor, a tuple of positional arguments or a dict of keyword arguments, on the model's device. Sizes
    that the model leaves free (batch, length) stay free; another value of a size that it fixes is refused when called.

    `backend="torchscript"` gives a `torch.jit.ScriptModule` whose file (`.pt`) needs nothing of this package; an output that
    is a dataclass or a dict becomes a dict of tensors without its None fields, its nested parts under dotted names.
    `"inductor"` (`.pt2`), `"onnxruntime"` (`.onnx`) and `"openvino"` (`.xml` and `.bin`) need their packages, take and return
    flat tensors in their files, and return here what the model returns. `"auto"` builds all that are present, lets them race
    on the example inputs and returns the fastest that agrees with the model.

    Raises ValueError for a model or submodule in training mode, inputs on another device, control flow that depends on data
    (unless TorchScript can compile it), a result that differs from the model, and a back end that is unknown or absent;
    TypeError for inputs or outputs that aren't made of tensors.
    """
    if backend not in (*BACKENDS, "auto"):
        raise ValueError(f"backend is {backend!r}; allowed: auto, {', '.join(BACKENDS)}")
    check_inputs(model, example_inputs)
    if backend == "auto":
        rows = compare(model, example_inputs)
        contenders = [c for c in rows if c.model is not None and c.backend != "eager"]
        if not contenders:
            reasons = "; ".join(f"{r.backend}: {r.reason}" for r in rows if r.reason)
            raise ValueError(f"no back end can take {type(model).__name__}: {reasons}")
        return min(contenders, key=lambda c: c.latency_ms).model
    if backend == "torchscript":
        return _torchscript(model, example_inputs)[0]
    if reason := backends.missing(backend):
        raise ValueError(reason)
    program = capture(model, example_inputs)
    simple, tensors = program.copy(), flatten(example_inputs, "example_inputs")[0]
    simplify(simple)
    try:
        fused = backends.build(simple, backend, tensors)
    except ValueError:  # its compiler knows what the model's authors wrote, and perhaps not what the passes made of it
        fused = backends.build(program, backend, tensors)
    check(fused, model, example_inputs, sizes=False)
    return fused


def _torchscript(model: nn.Module, example_inputs: Any) -> tuple[nn.Module, Plan | None]:
    if not torchscript.available():
        raise ValueError("this torch has no TorchScript: use backend='auto' or 'inductor'")
    try:
        made = plan(model, example_inputs)
        return made.fused, made
    except CaptureError as error:
        fused = torchscript.without_export(model, example_inputs, reason=str(error))
    check(fused, model, example_inputs)
    return fused, None


def compare(model: nn.Module, example_inputs: Any, *, names: Sequence[str] = BACKENDS) -> list[Contender]:
    """Eager and every back end of `names`, each checked against eager and timed in turns; absent ones say why."""
    check_inputs(model, example_inputs)
    rows = [Contender("eager", model, difference=0.0)]
    for name in names:
        row = Contender(name)
        rows.append(row)
        try:
            if name == "torchscript":
                row.model, row.plan = _torchscript(model, example_inputs)
            else:
                row.model = fuse(model, example_inputs, backend=name)
            row.difference = check(row.model, model, example_inputs, sizes=False)
        except (ValueError, TypeError) as error:
            row.model, row.reason = None, str(error)
    times = race({r.backend: r.model for r in rows if r.model is not None}, example_inputs, seconds=1.0)
    for row in rows:
        row.latency_ms = times.get(row.backend)
    return rows
