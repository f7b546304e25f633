"""Up to which rank a pair is no slower than the layer it replaces, by timing on this machine.

The result depends on the machine and on its load, which is why `factorize_low_rank` asks only when told to.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

from quantize.low_rank import layers as pairs

_KNOWN: dict[tuple, int] = {}


@torch.no_grad()
def fastest_ranks(layer: nn.Module, input_shape: Sequence[int], ranks: Sequence[int]) -> list[int]:
    """Those of `ranks` (rising) at which a pair takes no longer than `layer` on a random input of this shape.

    A pair's time rises with its rank, so the limit is found by bisection. It is remembered per shape and number of threads.
    """
    weight = layer.weight
    settings = [getattr(layer, n, None) for n in ("stride", "padding", "dilation")]
    kind = (type(layer), tuple(weight.shape), weight.dtype, str(settings))
    key = (*kind, tuple(input_shape), tuple(ranks), torch.get_num_threads())
    if key not in _KNOWN:
        x = torch.randn(tuple(input_shape)).to(weight.dtype)
        low, high = 0, len(ranks)  # ranks[:low] are fast enough, ranks[high:] aren't
        while low < high:
            middle = (low + high) // 2
            if _no_slower(_random_pair(layer, ranks[middle]), layer, x):
                low = middle + 1
            else:
                high = middle
        _KNOWN[key] = low
    return list(ranks[: _KNOWN[key]])


def _random_pair(layer: nn.Module, rank: int) -> nn.Module:
    m, k = pairs.matrix(layer).shape
    return pairs.pair(layer, torch.randn(rank, k), torch.randn(m, rank), layer.bias)


def _no_slower(candidate: nn.Module, layer: nn.Module, x: torch.Tensor, *, repeats: int = 15) -> bool:
    """Medians of alternating runs, so that a change of the machine's load hits both."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 2):
        for module, taken in zip((candidate, layer), times, strict=True):
            start = time.perf_counter()
            module(x)
            if turn >= 2:  # the first ones warm caches up
                taken.append(time.perf_counter() - start)
    return statistics.median(times[0]) <= statistics.median(times[1])
