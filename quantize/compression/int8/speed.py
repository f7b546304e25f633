"""Which layers a stopwatch finds slower in int8 on this machine, and whether the whole model is."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantize import calibration as calibrating
from quantize import clock, surgery
from quantize.calibration import Pace
from quantize.compression.int8.layers import Choice, Plan, Report, converted
from quantize.native.conv import channels_last
from quantize.nn.timing import Timing, time_layers
from quantize.saying import Say

ROWS = (1, 16, 256)  # of an input, where no calibration says how many a layer gets
STEPS, SEQUENCES = 32, (1, 16)  # and of a recurrent layer's
PIXELS = (14**2, 56**2)  # and of a convolution's
_SURELY = 0.8  # of the float model's time: one call is enough to tell
_ALIKE = 1.03  # of it: nobody can tell
_RECORDING = 8  # calls, at most, in which nested modules are recorded (`quantize.nn.replay`)
_MOST_PRODUCTS = 1 << 28  # of a convolution that is timed; images are smaller where it has more
_UNKNOWN = (
    "its forward doesn't say which axis of its experts is their input: prefer='size' stores them "
    "in int8, and each use computes the float numbers"
)
Shape = tuple[int, ...]
Shapes = Collection[Shape]


def slower(
    choice: Choice,
    shapes: Mapping[str, Shapes],
    say: Say,
    decided: Collection[str] = (),
) -> Report:
    """The chosen layers that are slower in int8 on one of their inputs, with the two times.

    Args:
        choice: layers that can become int8. Embeddings aren't timed: they compute nothing.
        shapes: by layer, the shapes of its inputs on calibration; the layer is timed on the
            smallest, the middle and the largest. Without any, a linear layer is timed at ROWS, a
            recurrent one on STEPS steps of as many sequences as SEQUENCES says, a convolution on
            one sample of about PIXELS. Without calibration, those of samples, for convolutions.
        say: called with a line for people before each layer.
        decided: layers that aren't timed.
    """
    found: Report = {}
    timed = {name: fact for name, fact in choice.chosen.items() if name not in decided}
    pace = Pace(len(timed))
    for name, fact in timed.items():
        say(pace.next(f"timing {name or 'the model'} in float and in int8"))
        if fact.experts and surgery.has_inputs_first(fact.module) is None:
            found[name] = _UNKNOWN
            continue
        timings = []
        for part in _parts(fact):
            timings += [_timed(part, shape) for shape in timed_shapes(part, shapes.get(name, ()))]
        lost = [str(timing) for timing in timings if timing.int8_s > timing.float_s]
        if lost:
            found[name] = f"int8 is slower here: {', '.join(lost)}"
    return found


def _parts(fact: surgery.Facts) -> list[surgery.Facts]:
    """What is timed of a layer: itself, or a linear layer of each kind that its experts have."""
    module: Any = fact.module
    parts = []
    for name in surgery.expert_weights(module):
        matrix = getattr(module, name)[0].detach()
        matrix = matrix.t() if surgery.has_inputs_first(module) else matrix
        linear = nn.Linear(*matrix.shape[::-1], bias=False, device="meta")
        linear.weight = nn.Parameter(matrix, requires_grad=False)
        parts.append(surgery.Facts(linear, (name,), transposed=False, obstacle=None))
    return parts or [fact]


def affordable(
    plans: Mapping[str, Plan],
    choice: Choice,
    shapes: Mapping[str, Shapes],
    say: Say,
) -> dict[str, Plan]:
    """Those plans for layers with outliers with which a layer still isn't slower than in float."""
    found = {}
    pace = Pace(len(plans))
    for name, plan in plans.items():
        say(pace.next(f"timing {name or 'the model'} with outlier channels"))
        fact = choice.chosen[name]
        own = timed_shapes(fact, shapes.get(name, ()))
        timings = [_timed(fact, shape, plan) for shape in own]
        if all(timing.int8_s <= timing.float_s for timing in timings):
            found[name] = plan
    return found


def slower_as_a_whole(plain: nn.Module, small: nn.Module, batches: Iterable[Any]) -> str | None:
    """The two times of a call, if the int8 model takes longer than the float one for the smallest
    or the largest batch.

    Args:
        plain, small: the float model and the int8 one; they run in eval mode.
        batches: one at least.
    """
    smallest, largest = min(batches, key=_numbers), max(batches, key=_numbers)
    timed = {_numbers(batch): batch for batch in (smallest, largest)}
    with calibrating.watching((), plain, small):
        for batch in timed.values():
            calls = [partial(calibrating.call, model, batch) for model in (plain, small)]
            float_s, int8_s = clock.race(calls, least=1)
            if int8_s > _SURELY * float_s:  # a second look, as long as it takes to be sure
                warm_up = min(_RECORDING, max(1, round(0.5 / float_s)))
                float_s, int8_s = clock.race(calls, least=3, seconds=0.3, warm_up=warm_up)
            if int8_s > _ALIKE * float_s:
                times = f"{1e3 * int8_s:.3g} ms against {1e3 * float_s:.3g}"
                return f"{times} for a batch of {_numbers(batch)} numbers"
    return None


def is_slower(module: nn.Module, other: nn.Module, shapes: Shapes) -> bool:
    """Does a module of convolutions take longer than another one on inputs of one of the shapes, or
    can neither run on any?
    """
    fitting = 0
    for shape in shapes:
        x = _example(shape)
        try:
            times = clock.race([partial(one, x) for one in (module, other)], least=3, seconds=0.02)
        except (RuntimeError, ValueError):  # it is smaller than a kernel
            continue
        fitting += 1
        if times[0] > times[1]:
            return True
    return not fitting


def _numbers(batch: Any) -> int:
    return sum(x.numel() for x in calibrating.output_tensors(batch))


def timed_shapes(fact: surgery.Facts, shapes: Shapes) -> list[Shape]:
    """Shapes of the inputs on which a layer is timed; `shapes`: of those on calibration."""
    module: Any = fact.module
    if fact.linear:
        inputs = module.weight.shape[0 if fact.transposed else 1]
        return [(count, inputs) for count in row_counts(shapes)]
    if not (fact.recurrent or fact.convolution or fact.transposed_convolution):
        return []
    if shapes:
        return _three(sorted(shapes, key=math.prod))
    if not fact.recurrent:
        return [(1, module.in_channels, *_sizes(module, pixels)) for pixels in PIXELS]
    sizes = [(count, STEPS) if module.batch_first else (STEPS, count) for count in SEQUENCES]
    return [(*size, module.input_size) for size in sizes]


def _sizes(conv: Any, pixels: int) -> list[int]:
    """Of an input of about so many pixels, none smaller than the kernel."""
    dims = len(conv.kernel_size)
    outputs = _MOST_PRODUCTS * math.prod(conv.stride) / conv.weight.numel()
    side = round(min(pixels, outputs) ** (1 / dims))
    reaches = [d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    return [max(side, reach) for reach in reaches]


def row_counts(shapes: Shapes) -> list[int]:
    """The numbers of rows at which a linear layer is timed, from the shapes of its inputs
    `[..., K]`.
    """
    counts = sorted({math.prod(shape[:-1]) for shape in shapes} - {0})
    return _three(counts) if counts else list(ROWS)


def _three(ordered: list[Any]) -> list[Any]:
    """The first, the middle and the last."""
    places = {0, len(ordered) // 2, len(ordered) - 1}
    return [ordered[at] for at in sorted(places)]


def _timed(fact: surgery.Facts, shape: Shape, plan: Plan | None = None) -> Timing:
    """A layer in float and in int8 on an input of that shape; on the CPU."""
    module: Any = fact.module
    x = _example(shape).to(next(module.parameters()).dtype)
    if x.dim() == 4 and channels_last(module.weight):
        x = x.contiguous(memory_format=torch.channels_last)
    outliers = None if plan is None else len(plan.channels)
    return time_layers(module, partial(converted, fact, plan), x, kind=outliers)


def _example(shape: Shape) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32)
