"""Is a fused model still the model? Compare it with eager, call after call, and on inputs of other
sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantize import clock, surgery
from quantize.calibration import call, largest_difference, relative_error, untouched
from quantize.nn.int8 import Int8Linear
from quantize.nn.int8_conv import Int8Conv
from quantize.nn.int8_outliers import Int8OutlierLinear
from quantize.nn.int8_stock import IN_GRAPH
from quantize.run.fusion.graph import Program, lines_of
from quantize.run.fusion.nested import Spec, duplicate, flatten, unflatten
from quantize.run.fusion.sizes import holds, other_sizes, violating
from quantize.run.fusion.state import Answers, Call, one_call

_BURST_S = 0.05
# of the largest value; a model that differs from its float64 twin by more isn't rounded, it's
# another
_ROUNDING_AT_MOST = 1e-2
# A model in 8 bits may round each activation to the next step: its file may differ by so many times
# what all of this rounding does, and by so much of the largest value.
_OF_NOISE, _NOISE_AT_MOST = 2.5, 0.25
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def outputs(model: Callable[..., Any], inputs: Any) -> list[Tensor]:
    """The model's output tensors, in the order a fused file gives them; neither inputs nor random
    state are changed.
    """
    tensors, spec = flatten(inputs, "example_inputs")
    return one_call(model, spec, tensors).outputs


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference relative to the largest expected value, the worst over all tensors; inf
    for other shapes; see `largest_difference`.
    """
    if len(actual) != len(expected):
        return math.inf
    return max(map(largest_difference, actual, expected), default=0.0)


def tolerance(expected: list[Tensor], model: nn.Module) -> float:
    """Allowed difference for the coarsest floating dtype among outputs and weights."""
    dtypes = {t.dtype for t in [*expected, *model.parameters(), *model.buffers()]}
    return max([TOLERANCE[d] for d in dtypes if d in TOLERANCE] or [0.0])


def rounding(model: nn.Module, inputs: Any, expected: list[Tensor]) -> float:
    """How far the model's own outputs are from those it gives in float64; 0 if it can't run in
    float64.
    """
    try:
        tensors, spec = flatten(inputs, "example_inputs")
        wide = unflatten(spec, [t.double() if t.is_floating_point() else t for t in tensors])
        exact = outputs(surgery.clone(model).double(), wide)
    except Exception:  # a model may insist on a dtype in any way
        return 0.0
    return difference([e.to(o.dtype) for e, o in zip(exact, expected, strict=True)], expected)


def noise(model: nn.Module, seen: Answers) -> float:
    """How far a model's first answer is from that with the inputs of its int8 layers in float; 0
    without int8 convolutions and linear layers.
    """
    if not any(_computes_in_int8(module) for module in model.modules()):
        return 0.0
    first = seen.calls[0]
    return difference(one_call(in_floats(model), seen.spec, first.inputs).outputs, first.outputs)


def in_floats(model: nn.Module) -> nn.Module:
    """A copy whose int8 convolutions and linear layers compute in float."""
    twin = surgery.clone(model).eval()
    for module in twin.modules():
        if isinstance(module, Int8Conv):
            module.floats = True
        elif type(module) in _IN_FLOAT:
            module.__class__ = _IN_FLOAT[type(module)]
    return twin


def integer_products(model: nn.Module, seen: Answers) -> int:
    """How many products of bytes a model's linear layers take in its first call."""
    counts: list[int] = []

    def count(layer: Any, _: tuple[Any, ...], output: Tensor) -> None:
        counts.append(output.numel() * layer.in_features)

    twin = in_floats(model)
    for layer in twin.modules():
        if isinstance(layer, _FloatLinear):
            layer.register_forward_hook(count)
    one_call(twin, seen.spec, seen.calls[0].inputs)
    return sum(counts)


def _computes_in_int8(module: nn.Module) -> bool:
    return isinstance(module, Int8Conv) or type(module) in _IN_FLOAT


class _FloatLinear(Int8Linear):
    """One that computes in float."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        y = F.linear(input.float(), self.dense_weight(), bias)
        y = y if self.activation is None else IN_GRAPH[self.activation](y)
        return y.to(input.dtype)


class _FloatOutlierLinear(_FloatLinear, Int8OutlierLinear):
    """One that computes in float."""


_IN_FLOAT = {Int8Linear: _FloatLinear, Int8OutlierLinear: _FloatOutlierLinear}


class Checker:
    """Compares fused models with `model` on `seen`, what it answered, and, with `sizes`, on inputs
    of other sizes.

    Args of its calls: `fused`, and `rewind`, which puts the state of `fused` back to where the
    model's is.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, seen: Answers, *, sizes: bool = True
    ) -> None:
        self.model, self.example_inputs, self.seen = model, example_inputs, seen
        others = other_sizes(example_inputs) if sizes else ()
        self.cases = [flatten(inputs, "inputs")[0] for inputs in others]
        self.noise = noise(model, seen)
        own = tolerance(seen.calls[0].outputs, model)
        self.allowed = max(own, min(_OF_NOISE * self.noise, _NOISE_AT_MOST))
        self.distance = 0.0  # of the last one: norm of the difference over norm
        self.rounded = False
        self.whims = 0.0
        self.others: dict[int, Call | None] = {}  # the model's answers at other sizes
        self.large = sum(t.numel() for t in seen.calls[0].outputs) > 1 << 22

    def timed(self) -> list[Any]:
        """What times are taken on: the example inputs and, of a batch, its first row."""
        tensors, spec = self.seen.calls[0].inputs, self.seen.spec
        counts = {t.shape[0] for t in tensors if t.dim()}
        if len(counts) != 1 or counts <= {0, 1}:
            return [self.example_inputs]
        row = unflatten(spec, [t[:1] if t.dim() else t for t in tensors])
        return [self.example_inputs, row]

    @property
    def later(self) -> float:
        """Allowed at later calls and at other sizes, where numbers round otherwise; a coarse dtype
        allows enough already.
        """
        return max(self.allowed, min(10 * self.allowed, 0.05))

    def __call__(
        self, fused: Callable[..., Any], rewind: Callable[[], None] = lambda: None
    ) -> float:
        """Largest relative difference on the example inputs.

        Raises ValueError if it is beyond the tolerance there (1e-5 in float32, or 4 times the
        model's own rounding error), or if a later call, an input afterwards or the answer at
        another size differs by more than 10 times that (at most 0.05). A fused model that refuses
        another size passes: refusing is not wrong.
        """
        try:
            worst = self._calls(fused)
            rewind()
            for i, tensors in enumerate(self.cases):
                off = self._other(fused, i)
                rewind()
                if off > self.later:
                    shapes = [tuple(t.shape) for t in tensors]
                    raise ValueError(
                        f"with inputs of shapes {shapes} the fused model differs from eager by "
                        f"{off:.2g}"
                    )
            return worst
        finally:
            rewind()

    def first(self, fused: Callable[..., Any], rewind: Callable[[], None]) -> float:
        """Norm of the difference over norm on the example inputs alone; ValueError beyond the
        tolerance there.
        """
        expected = self.seen.calls[0]
        actual = one_call(fused, self.seen.spec, expected.inputs)
        rewind()
        self._refuse_far(difference(actual.outputs, expected.outputs))
        return _away(actual, expected)

    def _refuse_far(self, first: float) -> None:
        if first > self.allowed:
            raise ValueError(
                f"the fused model differs from eager by {first:.2g} of the largest value; "
                f"allowed is {self.allowed:.0e}"
            )

    def _calls(self, fused: Callable[..., Any]) -> float:
        # Not copied before the last call: no call may change what an earlier one returned.
        found = []
        for expected in self.seen.calls:
            try:
                found.append(one_call(fused, self.seen.spec, expected.inputs, copy=False))
            except Exception as error:  # an engine raises what it likes
                raise ValueError(
                    f"the fused model fails at call {len(found) + 1}: {last_line(error)}"
                ) from error
        pairs = list(zip(found, self.seen.calls, strict=True))
        first = difference(found[0].outputs, self.seen.calls[0].outputs)
        if first > self.allowed and not self.rounded:
            # a deep network may turn the last bit of a weight into more than that: how far off is
            # eager itself?
            self.rounded = True
            self.whims = self._whims()
            if self.whims <= self.allowed:
                self.allowed = max(self.allowed, min(4 * self._rounding(), _ROUNDING_AT_MOST))
        if self.whims > self.allowed:
            raise ValueError(
                f"eager itself differs by {self.whims:.2g} when it is called again with the "
                f"same inputs, state and random "
                "numbers: its forward reads something that isn't in the model (a global "
                "variable, the clock)"
            )
        self._refuse_far(first)
        for i, (actual, expected) in enumerate(pairs):
            self._inputs_alike(actual, expected)
            off = difference(actual.outputs, expected.outputs)
            if off > self.later or actual.constants != expected.constants:
                changed = ", ".join(self.seen.changed[:3])
                state = f"; its forward changes {changed}" if changed else ""
                raise ValueError(
                    f"at call {i + 1}, on other values, the fused model differs from eager by "
                    f"{off:.2g}{state}"
                )
        self.distance = _away(found[0], self.seen.calls[0])
        return first

    def _rounding(self) -> float:
        with untouched(self.model):
            return rounding(self.model, self.example_inputs, self.seen.calls[0].outputs)

    def _whims(self) -> float:
        """How far the model is from itself, called again with the same inputs from the same
        state.
        """
        expected = self.seen.calls[0]
        with untouched(self.model):
            again = one_call(self.model, self.seen.spec, expected.inputs)
        return difference(again.outputs, expected.outputs)

    def _inputs_alike(self, actual: Call, expected: Call) -> None:
        off = difference(actual.after, expected.after)
        if off > self.later:
            what = "an input is changed in place, which eager"
            if difference(expected.after, expected.inputs) > 0:
                what = "its forward changes its inputs in place, which"
            raise ValueError(
                f"{what} the fused model doesn't repeat (they differ by {off:.2g} afterwards)"
            )

    def _other(self, fused: Callable[..., Any], case: int) -> float:
        """Difference at inputs of other sizes; 0 where one of the two refuses them: refusing is not
        wrong.
        """
        tensors, spec = self.cases[case], self.seen.spec
        if case not in self.others:
            with untouched(self.model):
                self.others[case] = _tried(self.model, spec, tensors)
        expected = self.others[case]
        if self.large:
            self.others.clear()
        actual = None if expected is None else _tried(fused, spec, tensors)
        if expected is None or actual is None:
            return 0.0
        same = actual.constants == expected.constants
        return difference(actual.outputs, expected.outputs) if same else math.inf

    def settle(self, program: Program, fused: Callable[..., Any]) -> None:
        """Keep those doubtful conditions of `program` that matter: where they don't hold, `fused`
        answers wrongly.
        """
        if not program.doubtful:
            return
        self.cases += violating(program, flatten(self.example_inputs, "example_inputs")[0])
        for case, tensors in enumerate(self.cases):
            shapes = [t.shape for t in tensors]
            broken = [c for c in program.doubtful if not holds(c, shapes)]
            fits = all(holds(c, shapes) for c in program.conditions)
            if broken and fits and self._other(fused, case) > self.later:
                program.conditions += broken
            program.rewind()


def _away(actual: Call, expected: Call) -> float:
    """Norm of the difference of their outputs over norm."""
    parts = [[t for t in one.outputs if t.is_floating_point()] for one in (actual, expected)]
    return relative_error(*parts)


def last_line(error: BaseException) -> str:
    """Kind and reason of an error; TorchScript puts the reason at the end of its own traceback."""
    return f"{type(error).__name__}: {lines_of(error)[-1]}"


def _tried(model: Callable[..., Any], spec: Spec, tensors: list[Tensor]) -> Call | None:
    try:
        return one_call(model, spec, tensors)
    except Exception:  # a model may refuse a size in whatever way it likes
        return None


def race(
    models: Mapping[str, Callable[..., Any]], inputs: Any, *, seconds: float = 0.4, warm_up: int = 2
) -> dict[str, float]:
    """Median milliseconds per call of each model, for about `seconds` each and 5 calls at least.

    They take turns in bursts: see `clock.race`.
    """
    tensors, spec = flatten(inputs, "inputs")
    own = unflatten(spec, duplicate(tensors))  # a model may write into them
    calls = [partial(call, model, own, copy=False) for model in models.values()]
    with torch.random.fork_rng(devices=[]):
        medians = clock.race(calls, seconds=seconds, burst_s=_BURST_S, warm_up=warm_up)
    return {name: 1000 * median for name, median in zip(models, medians, strict=True)}
