"""How long a float layer and the layer that takes its place are at work, on this machine.

A pair is timed once per process for each shape of input. Nothing is kept for the next process: a
moment in which the machine was busy would decide for all of them, and one pair takes a few
hundredths of a second. What is timed is a call as an eager model makes it. Left out: what a
compiler, `fuse` or a native decoding step would make of the layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize import clock

_CACHE_BYTES = 32 << 20
_MOST_COPIES = 32
_NEAREST_BYTES, _FEW_COPIES = 1 << 18, 4  # inputs of so many bytes drive weights out themselves


@dataclass(frozen=True)
class Timing:
    """Of one call on an input of this shape.

    Args:
        shape: of the input.
        float_s: median seconds of the float layer.
        int8_s: median seconds of the layer in its place.
    """

    shape: tuple[int, ...]
    float_s: float
    int8_s: float

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return f"{1e6 * self.int8_s:.1f} us against {1e6 * self.float_s:.1f} for {shape}"


_known: dict[tuple[Any, ...], Timing] = {}


def time_layers(
    plain: nn.Module, make_small: Callable[[], nn.Module], x: Tensor, *, kind: Hashable = None
) -> Timing:
    """Time a float layer and what takes its place, once for each shape in this process.

    Copies of a layer take turns, so that its weights are not in the nearest cache, as in a whole
    model. Hooks are not called.

    Args:
        plain: the float layer. Layers of one class, with the same `extra_repr`, parameter shapes
            and dtypes, count as one.
        make_small: makes the int8 layer; called only where the shape isn't known yet.
        x: an input of both, on the CPU; its numbers don't matter.
        kind: of the int8 layer, where layers that count as one may become several kinds.

    Returns: the median times of a call.
    """
    form = tuple(x.shape), x.stride(), x.dtype
    key = (kind, *_kind(plain), *form, torch.get_num_threads())
    if key not in _known:
        runs = [_Cycle(layer, x) for layer in (plain, make_small())]
        warm_up = max(run.copies for run in runs)
        float_s, int8_s = clock.race(runs, least=5, seconds=0.01, warm_up=warm_up)
        if int8_s > float_s:  # a moment in which the machine was busy decides nothing
            float_s, int8_s = clock.race(runs, least=9, seconds=0.03)
        _known[key] = Timing(tuple(x.shape), float_s, int8_s)
    return _known[key]


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    shapes = [(name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters()]
    return type(layer), layer.extra_repr(), tuple(shapes)


class _Cycle:
    """Calls copies of a layer in turns, on two inputs in turns: the second call on the same tensor
    would find it quantized.
    """

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        tensors = itertools.chain(layer.parameters(), layer.buffers(), [x])
        size = max(1, sum(tensor.nbytes for tensor in tensors))
        most = _MOST_COPIES if x.nbytes < _NEAREST_BYTES else _FEW_COPIES
        self.copies = min(most, max(1, _CACHE_BYTES // size))
        self.layers = itertools.cycle([_copy(layer) for _ in range(self.copies)])
        self.inputs = itertools.cycle([x, x.clone()])

    def __call__(self) -> None:
        next(self.layers).forward(next(self.inputs))


def _copy(layer: nn.Module) -> nn.Module:
    """A copy on the CPU, with tensors of its own and everything else shared."""
    new = type(layer).__new__(type(layer))  # copy.copy refuses parametrized layers
    new.__dict__ |= layer.__dict__
    for kind in ("_parameters", "_buffers"):
        own = {name: _on_cpu(tensor) for name, tensor in vars(layer)[kind].items()}
        new.__dict__[kind] = own
    return new


def _on_cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to("cpu", copy=True)
