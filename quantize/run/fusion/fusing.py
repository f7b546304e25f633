"""`fuse` gives one back end's version of a model, `compare` those of several.

The passes that come before are named in the header of `quantize.run.fusion`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from quantize import check
from quantize.calibration import Pace, untouched
from quantize.nn import PackedLayer
from quantize.run.fusion import backends, torchscript
from quantize.run.fusion.equality import Checker, difference, outputs, race
from quantize.run.fusion.export import capture
from quantize.run.fusion.graph import CaptureError, check_inputs
from quantize.run.fusion.nested import flatten
from quantize.run.fusion.passes import simplify
from quantize.run.fusion.planning import Plan, note, plan
from quantize.run.fusion.state import answers, refuse_values
from quantize.saying import Say, silent

_LOSS = 1.1  # times the model's own time, from which a fused model is called slower
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

    def rewind(self) -> None:
        """Put the fused model's state back to where the model's is."""
        if self.plan is not None:
            self.plan.program.rewind()


def fuse(
    model: nn.Module,
    example_inputs: Any,
    *,
    backend: str = "torchscript",
    progress: Say | None = None,
) -> nn.Module:
    """A fused version of an eval-mode model: called like it, equal call after call, with `.save`.

    What is fastest on the example inputs and on their first row alone is taken, the model's own
    operators where rewritten ones lose. Sizes that the model leaves free (batch, length) stay free;
    another value of a size that it fixes is refused when called. State in tensors (a buffer that
    the forward changes) is carried from call to call and starts where the model's stands; the model
    itself, its state and the example inputs stay as they are. The result returns what the model
    returns. A model with layers in integers is timed beside its fused version, and a slower one
    warns with both times. In a TorchScript file, int8 linear layers become stock operations on
    integers, int8 convolutions oneDNN's, where all of a batch shares one range; or all of them
    compute in float, from weights that the file keeps in int8: what is faster on the example
    inputs, and in float where there is much to compute and a CPU has no VNNI. There the file is
    equal to the model with its inputs of layers in float, which differs by what rounding to 8 bits
    does to the model itself; in integers it may differ by 2.5 times as much.

    Args:
        model: in eval mode, with all its submodules.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments, on
            the model's device.
        backend: `"torchscript"` gives a `torch.jit.ScriptModule` whose file (`.pt`) needs nothing
            of this package; loaded from the file, an output that is a dataclass or a dict is a dict
            of tensors without its None fields, its nested parts under dotted names, and a named
            tuple is a tuple. `"inductor"` (`.pt2`), `"onnxruntime"` (`.onnx`) and `"openvino"`
            (`.xml` and `.bin`) need their packages; their files take and return flat tensors.
            `"auto"` builds all that are present, lets them race on the example inputs and takes the
            fastest that agrees with the model.
        progress: called with a line for people before each stage; a model of some size takes
            minutes.

    Returns:
        What is called like the model; `.save(path)` writes its file.

    Raises:
        ValueError: a model or submodule in training mode, inputs on another device, control flow
            that depends on data (unless TorchScript can compile it), state that can't be carried
            (numbers, lists), a result that differs from the model, and a back end that is unknown
            or absent.
        TypeError: inputs or outputs that aren't made of tensors.
    """
    check.one_of("backend", backend, ("auto", *BACKENDS))
    check_inputs(model, example_inputs)
    say = progress or silent
    if backend == "auto":
        rows = compare(model, example_inputs, progress=progress)
        contenders = [c for c in rows if c.model is not None and c.backend != "eager"]
        best = min(contenders, key=lambda c: c.latency_ms or math.inf, default=None)
        if best is None or best.model is None:
            reasons = "; ".join(f"{r.backend}: {r.reason}" for r in rows if r.reason)
            raise ValueError(f"no back end can take {type(model).__name__}: {reasons}")
        return best.model
    if backend == "torchscript":
        return _torchscript(model, example_inputs, say)[0]
    return _external(model, example_inputs, backend, say)


def _external(model: nn.Module, example_inputs: Any, backend: str, say: Say) -> nn.Module:
    if reason := backends.missing(backend):
        raise ValueError(reason)
    say("running the model")
    seen = answers(model, example_inputs)
    refuse_values(model, seen)
    say("exporting the model to a graph")
    program = capture(model, example_inputs, seen.changed)
    if program.state or program.writes_inputs:
        what = ", ".join(program.state) or "its inputs"
        raise ValueError(
            f"back end {backend!r} can't take this model: its forward changes {what} in place"
        )
    simple, tensors = program.copy(), flatten(example_inputs, "example_inputs")[0]
    simplify(simple)
    say(f"building: {backend}")
    try:
        fused = backends.build(simple, backend, tensors)
    except ValueError:  # it may not know operations that the passes put in: as the authors wrote it
        fused = backends.build(program, backend, tensors)
    say(f"comparing with the model: {backend}")
    checker = Checker(model, example_inputs, seen, sizes=False)
    checker(fused)
    note(fused, model, "fuse", checker.distance, backend=backend)
    return fused


def _torchscript(model: nn.Module, example_inputs: Any, say: Say) -> tuple[nn.Module, Plan | None]:
    if not torchscript.available():
        raise ValueError("this torch has no TorchScript: use backend='auto' or 'inductor'")
    try:
        made = plan(model, example_inputs, progress=say)
        note(made.fused, model, "fuse", made.distance, backend="torchscript", way=made.way)
        if any(isinstance(module, PackedLayer) for module in model.modules()):
            say("timing beside the model")
            _tell_loss(made, model, example_inputs)
        return made.fused, made
    except CaptureError as error:
        reason = str(error)
    seen = answers(model, example_inputs)
    if seen.written:
        names = ", ".join(seen.written[:3])
        raise ValueError(
            f"{type(model).__name__} can't be fused: its forward changes {names}, and {reason}"
        )
    say("compiling the model's own Python as TorchScript")
    fused = torchscript.without_export(model, example_inputs, reason=reason)
    say("comparing with the model")
    checker = Checker(model, example_inputs, seen)
    try:
        checker(fused)
    except ValueError as error:
        kind = type(model).__name__
        raise ValueError(f"{kind} can't be fused: {reason}; without a graph, {error}") from error
    note(fused, model, "fuse", checker.distance, backend="torchscript", way="without export")
    return fused, None


def _tell_loss(made: Plan, model: nn.Module, example_inputs: Any) -> None:
    """Warn where a graph, which has stock operations alone, is slower than layers in integers."""
    times = _times(made, model, example_inputs)
    if times["fused"] > _LOSS * times["model"]:
        warnings.warn(
            f"{type(model).__name__} fused takes {times['fused']:.3g} ms here, the model itself "
            f"{times['model']:.3g}: a TorchScript file can't hold its int8 kernels",
            stacklevel=4,
        )


def _times(made: Plan, model: nn.Module, example_inputs: Any) -> dict[str, float]:
    """Milliseconds per call, in turns."""
    with untouched(model):
        times = race({"fused": made.fused, "model": model}, example_inputs)
    made.program.rewind()
    return times


def compare(
    model: nn.Module,
    example_inputs: Any,
    *,
    names: Sequence[str] = BACKENDS,
    progress: Say | None = None,
) -> list[Contender]:
    """Eager and every back end of `names`, each checked against eager and timed in turns; absent
    ones say why.
    """
    check_inputs(model, example_inputs)
    say = progress or silent
    rows = [Contender("eager", model, difference=0.0)]
    pace = Pace(len(names))
    for name in names:
        say(pace.next(f"back end {name}"))
        row = Contender(name)
        rows.append(row)
        try:
            if name == "torchscript":
                row.model, row.plan = _torchscript(model, example_inputs, say)
            else:
                row.model = fuse(model, example_inputs, backend=name, progress=progress)
            with untouched(model):
                actual, expected = (outputs(m, example_inputs) for m in (row.model, model))
                row.difference = difference(actual, expected)
            row.rewind()
        except (ValueError, TypeError) as error:
            row.model, row.reason = None, str(error)
    say("timing")
    built = {row.backend: row.model for row in rows if row.model is not None}
    with untouched(model):
        times = race(built, example_inputs, seconds=1.0)
    for row in rows:
        row.latency_ms = times.get(row.backend)
        row.rewind()
    return rows
