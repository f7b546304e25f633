"""How long a layer takes at each size and in each way to store it, on this machine.

A layer is timed on an input of the shape that it gets in a call of the model, once for each
distinct shape; layers of random weights stand in for sizes that no layer has yet. What is timed is
an eager call. Left out: what lies between layers, for which the search corrects by whole files.
"""

from __future__ import annotations

import copy
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantize import calibration as calibrating
from quantize import clock
from quantize.compression.half import to_half
from quantize.compression.int4 import quantize_weights
from quantize.compression.int8.layers import choose, convert
from quantize.nn import low_rank as pairs

FLOAT, INT8, BF16, INT4 = "float", "int8", "bf16", "int4"
_CACHE_BYTES, _MOST_COPIES = 8 << 20, 4  # copies take turns: a model's weights are cold
_FEWEST, _SECONDS = 5, 0.004  # timed calls of a contender, and about how long they take
_MOST_TIMES = 2  # as large as a layer that another is held to
_MOST_NUMBERS = 1 << 21  # in an input; more of them change the time in proportion

Seconds = dict[str, float]


class Stopwatch:
    """Times layers, each kind and shape once.

    Args:
        kinds: what each is timed in, of "float", "int8", "bf16", "int4".
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self.kinds = tuple(kinds)
        self.known: dict[tuple[Any, ...], Seconds] = {}  # by what is alike, and sizes

    def settle(self) -> None:
        """Let no layer take more for each product than a narrower one of at least half its size: a
        busy moment makes one layer slower than all that it is weighed against.
        """
        for key in sorted(self.known, key=lambda key: -math.prod(key[1:])):
            (like, *size), seconds = key, self.known[key]
            for (other, *smaller), known in self.known.items():
                times = math.prod(size) / math.prod(smaller)
                if other == like and times <= _MOST_TIMES and all(map(operator.ge, size, smaller)):
                    seconds |= {kind: min(s, times * known[kind]) for kind, s in seconds.items()}

    def share(self, model: nn.Module, example_inputs: Any, layers: Iterable[nn.Module]) -> float:
        """Which share of a call of the model its layers take, in the median of some calls: alone
        they are up to twice as fast, as their inputs are in the caches.
        """
        call = partial(calibrating.call, model, example_inputs, copy=False)
        return clock.share(call, layers, least=_FEWEST)

    def whole(self, layer: Any, shape: Sequence[int], inputs: int, outputs: int) -> Seconds:
        """Of a layer like this one with so many input and output channels.

        Args:
            layer: a linear layer (`Conv1D` too) or a convolution.
            shape: of its input, with the channels that it has now.
        """
        channel = _channel(layer)
        sizes, places = list(shape), list(shape)
        sizes[channel], places[channel] = inputs, 0
        like = (_settings(layer), tuple(places))
        return self._timed((like, inputs, outputs), partial(_like, layer, inputs, outputs), sizes)

    def pair(self, layer: Any, shape: Sequence[int], rank: int) -> Seconds:
        """Of a pair of this rank in the layer's place."""
        like = (_settings(layer), tuple(shape), len(pairs.matrix(layer)))
        return self._timed((like, rank), partial(_pair, layer, rank), shape)

    def _timed(
        self, key: tuple[Any, ...], make: Callable[[], nn.Module], shape: Sequence[int]
    ) -> Seconds:
        """Of a layer that is made unless one like it, of the same sizes, was timed."""
        if key not in self.known:
            self.known[key] = self._race(make(), shape)
        return self.known[key]

    def _race(self, layer: nn.Module, shape: Sequence[int]) -> Seconds:
        x, times = _input(shape)
        layers = {kind: made(layer, kind) for kind in self.kinds}
        runs = [_turns(one, x) for one in layers.values()]
        calls = [run for run, _ in runs]
        warm_up = max(copies for _, copies in runs)  # a copy packs its weights in its first call
        seconds = clock.race(calls, least=_FEWEST, seconds=_SECONDS, warm_up=warm_up)
        return {kind: times * taken for kind, taken in zip(layers, seconds, strict=True)}


def _channel(layer: nn.Module) -> int:
    """The dimension of a layer's input that its channels are along."""
    convolution = isinstance(layer, (nn.Conv1d, nn.Conv2d))
    return -1 - len(layer.kernel_size) if convolution else -1


def _settings(layer: Any) -> tuple[Any, ...]:
    """What two layers of the same sizes may differ in, but for their weights."""
    biased = layer.bias is not None
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return (nn.Linear, biased)
    kind = nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Conv2d
    last = kind is nn.Conv2d and layer.weight.is_contiguous(memory_format=torch.channels_last)
    places = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return (kind, biased, last, *places)


def _like(layer: Any, inputs: int, outputs: int) -> nn.Module:
    """A layer of random weights with the other settings of this one."""
    kind, biased, *more = _settings(layer)
    if kind is nn.Linear:
        return nn.Linear(inputs, outputs, biased)
    last, *places = more
    new = kind(inputs, outputs, *places, bias=biased)
    return new.to(memory_format=torch.channels_last) if last else new


def _pair(layer: Any, rank: int) -> nn.Module:
    """A pair of random weights in the place of this layer."""
    m, k = pairs.matrix(layer).shape
    return pairs.pair(layer, torch.randn(rank, k), torch.randn(m, rank), layer.bias)


def _input(shape: Sequence[int]) -> tuple[Tensor, float]:
    """Random numbers of this shape, or of fewer rows, and how many times as many there were."""
    rest = 1
    for size in shape[1:]:
        rest *= size
    first = max(1, min(shape[0], _MOST_NUMBERS // max(rest, 1)))
    return torch.randn(first, *shape[1:]), shape[0] / first


def _turns(layer: nn.Module, x: Tensor) -> tuple[Callable[[], object], int]:
    """A function that calls copies in turns, and how many there are; on two inputs in turns, as
    int8 layers know an input that they have quantized before.
    """
    stored = sum(tensor.nbytes for tensor in layer.state_dict().values())
    count = min(_MOST_COPIES, max(1, _CACHE_BYTES // max(stored, 1)))
    layers = itertools.cycle([copy.deepcopy(layer) for _ in range(count)])
    inputs = itertools.cycle([x, x.clone()])
    return lambda: next(layers)(next(inputs)), count


def as_float(layer: nn.Module) -> nn.Module:
    """The layer as it is."""
    return layer.eval()


def as_int8(layer: nn.Module) -> nn.Module:
    """The layer in int8; as it is where it can't be."""
    model = nn.Sequential(copy.deepcopy(layer)).eval()
    choice = choose(model, lambda _name, _module: False, embeddings=False)
    return _only(convert(model, choice.chosen)) if choice.chosen else layer


def as_bf16(layer: nn.Module) -> nn.Module:
    """The layer with bfloat16 weights."""
    return _only(to_half(nn.Sequential(layer), torch.bfloat16).eval())


def as_int4(layer: nn.Module) -> nn.Module:
    """The layer in 4 bits, rounded to the nearest; in int8 where it can't be."""
    try:
        return _only(quantize_weights(nn.Sequential(layer)).eval())
    except ValueError:
        return as_int8(layer)


def made(layer: nn.Module, kind: str) -> nn.Module:
    """The layer in one of the kinds."""
    return _MADE[kind](layer)


def _only(model: nn.Module) -> nn.Module:
    return next(model.children())


_MADE = {FLOAT: as_float, INT8: as_int8, BF16: as_bf16, INT4: as_int4}
