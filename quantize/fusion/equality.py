"""Is a fused model still the model? Compare it with eager on the example inputs and on inputs of other sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from quantize import surgery
from quantize.calibration import call
from quantize.fusion.nested import flatten, plain, unflatten

_PAUSE_S, _BURST_S = 0.01, 0.05
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@torch.no_grad()
def outputs(model: Callable[..., Any], inputs: Any) -> list[torch.Tensor]:
    """The model's output tensors, in the order a fused file gives them; neither inputs nor random state are changed."""
    tensors, spec = flatten(inputs, "example_inputs")
    with torch.random.fork_rng(devices=[]):
        result = call(model, unflatten(spec, [t.clone() for t in tensors]))
    tensors, spec = flatten(result, "the model's output")
    return flatten(unflatten(plain(spec), tensors), "the model's output")[0]


def difference(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest difference relative to the largest expected value, the worst over all tensors; inf for other shapes.

    Where both are the same infinity or both are NaN they don't differ.
    """
    if len(actual) != len(expected):
        return float("inf")
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape or a.dtype != e.dtype:
            return float("inf")
        a, e = a.detach().double(), e.detach().double()
        finite = torch.isfinite(e)
        if not torch.equal(torch.isfinite(a), finite) or not torch.equal(a[~finite].nan_to_num(), e[~finite].nan_to_num()):
            return float("inf")
        if finite.any():
            scale = e[finite].abs().max().clamp_min(1e-6)
            worst = max(worst, ((a - e)[finite].abs().max() / scale).item())
    return worst


def tolerance(expected: list[torch.Tensor], model: nn.Module) -> float:
    """Allowed difference for the coarsest floating dtype among outputs and weights."""
    dtypes = {t.dtype for t in [*expected, *model.parameters(), *model.buffers()]}
    return max([TOLERANCE[d] for d in dtypes if d in TOLERANCE] or [0.0])


def rounding(model: nn.Module, inputs: Any, expected: list[torch.Tensor]) -> float:
    """How far the model's own outputs are from those it gives in float64; 0 if it can't run in float64."""
    try:
        tensors, spec = flatten(inputs, "example_inputs")
        wide = unflatten(spec, [t.double() if t.is_floating_point() else t for t in tensors])
        exact = outputs(surgery.clone(model).double(), wide)
    except Exception:  # a model may insist on a dtype in any way
        return 0.0
    return difference([e.to(o.dtype) for e, o in zip(exact, expected, strict=True)], expected)


def other_sizes(example_inputs: Any) -> Iterator[Any]:
    """The example inputs with other sizes, one group of equal sizes at a time: twice the batch and one, longer and shorter."""
    tensors, spec = flatten(example_inputs, "example_inputs")
    for dim in range(max(t.dim() for t in tensors)):
        for size in sorted({t.shape[dim] for t in tensors if t.dim() > dim}):
            groups = [t.dim() > dim and t.shape[dim] == size for t in tensors]
            yield unflatten(spec, [torch.cat([t, t.flip(dim)], dim) if g else t for t, g in zip(tensors, groups, strict=True)])
            if size > 1:
                less = 1 if dim == 0 else size - 1
                yield unflatten(spec, [t.narrow(dim, 0, less) if g else t for t, g in zip(tensors, groups, strict=True)])


def check(fused: Callable[..., Any], model: nn.Module, example_inputs: Any, *, sizes: bool = True) -> float:
    """Largest relative difference on the example inputs.

    Raises ValueError if it is beyond the tolerance there (1e-5 in float32, or 4 times the model's own rounding error), or at
    another size where eager answers and the fused model answers differently. A fused model that refuses another size passes:
    refusing is not wrong.
    """
    expected = outputs(model, example_inputs)
    allowed = tolerance(expected, model)
    worst = difference(outputs(fused, example_inputs), expected)
    if worst > allowed:  # a deep network may turn the last bit of a weight into more than that: how far off is eager itself?
        allowed = max(allowed, 4 * rounding(model, example_inputs, expected))
    if worst > allowed:
        raise ValueError(f"the fused model differs from eager by {worst:.2g} of the largest value; allowed is {allowed:.0e}")
    for inputs in other_sizes(example_inputs) if sizes else ():
        try:
            expected = outputs(model, inputs)
        except Exception:  # eager refuses this size, in whatever way it likes
            continue
        shapes = [tuple(t.shape) for t in flatten(inputs, "example_inputs")[0]]
        try:
            actual = outputs(fused, inputs)
        except Exception:  # refusing is allowed, answering wrongly is not
            continue
        off = difference(actual, expected)
        if off > max(10 * allowed, 1e-4):
            raise ValueError(f"with inputs of shapes {shapes} the fused model differs from eager by {off:.2g}")
    return worst


@torch.no_grad()
def race(models: Mapping[str, Callable[..., Any]], inputs: Any, *, seconds: float = 0.4, warm_up: int = 2) -> dict[str, float]:
    """Median milliseconds per call of each model, for about `seconds` each and 5 calls at least.

    The models take turns in bursts. Between two bursts is a pause, because the threads of an engine go on spinning for a while
    after its call and take the cores from the next one; the first call of a burst wakes the engine's own and doesn't count.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.random.fork_rng(devices=[]):
        for _ in range(warm_up):
            for model in models.values():
                call(model, inputs)
        while min(map(len, times.values())) < 5 or sum(map(sum, times.values())) < 1000 * seconds * len(times):
            for name, model in models.items():
                time.sleep(_PAUSE_S)
                call(model, inputs)
                burst: list[float] = []
                while len(burst) < 2 or sum(burst) < 1000 * _BURST_S:
                    start = time.perf_counter()
                    call(model, inputs)
                    burst.append(1000 * (time.perf_counter() - start))
                times[name] += burst
    return {name: statistics.median(values) for name, values in times.items()}
