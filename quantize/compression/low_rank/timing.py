"""Up to which size a pair is no slower than the layer it replaces, by timing on this machine.

Coarse on purpose: a few sizes are tried, and a pair may take a little longer, so that the result
says something of the machine and not of the moment. Layers that take as long as a call does anyhow
say nothing about either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantize import clock
from quantize.calibration import untouched
from quantize.nn import low_rank as pairs

SHARES = (0.8, 0.65, 0.5, 0.35, 0.2)  # of the layer's parameters, tried in this order
TOLERANCE = 1.03
# seconds that a layer takes before it is worth timing; a call of torch from Python takes 5 to 10 us
LONG_ENOUGH = 1e-4
MOST_NUMBERS = 2**20  # in an input: more change the time, but not which of the two is faster
LONG = 0.02  # seconds of a call from which on fewer of them tell as much

_KNOWN: dict[tuple, float | None] = {}


@torch.no_grad()
def quick_share(layer: nn.Module, input_shape: Sequence[int], *, always: bool) -> float | None:
    """The largest of `SHARES` at which a pair takes no longer than `layer` on random inputs of this
    shape; 0 if none does.

    None if the layer is too quick to tell, unless `always`. Remembered per kind of layer, shape and
    number of threads.
    """
    weight: Any = layer.weight
    settings = [getattr(layer, n, None) for n in ("stride", "padding", "dilation")]
    kind = (type(layer), tuple(weight.shape), weight.dtype, str(settings))
    key = (*kind, tuple(input_shape), always, torch.get_num_threads())
    if key not in _KNOWN:
        with untouched(layer):  # the random state too
            x = _inputs(layer, input_shape)
            _KNOWN[key] = None
            alone = _seconds([layer], x, 3)[0]
            least = 9 if alone < LONG else 3
            if always or alone >= LONG_ENOUGH:
                shares = (s for s in SHARES if _no_slower(_random_pair(layer, s), layer, x, least))
                _KNOWN[key] = next(shares, 0.0)
    return _KNOWN[key]


def _inputs(layer: Any, shape: Sequence[int]) -> Tensor:
    """Random inputs of this shape, or of fewer rows (images)."""
    if isinstance(layer, pairs.CONVOLUTIONS):
        one = 1 + len(layer.kernel_size)  # axes of one image or sound
        first, rest = shape[0] if len(shape) > one else 1, tuple(shape[-one:])
    else:
        first, rest = math.prod(shape[:-1]), (shape[-1],)
    rows = max(1, min(first, MOST_NUMBERS // max(1, math.prod(rest))))
    return torch.randn(rows, *rest).to(layer.weight.dtype)


def _random_pair(layer: Any, share: float) -> nn.Module:
    m, k = pairs.matrix(layer).shape
    rank = max(1, math.floor(share * m * k / (m + k)))
    return pairs.pair(layer, torch.randn(rank, k), torch.randn(m, rank), layer.bias)


def _no_slower(candidate: nn.Module, layer: nn.Module, x: Tensor, least: int) -> bool:
    pair, original = _seconds([candidate, layer], x, least)
    return pair <= TOLERANCE * original


def _seconds(modules: Sequence[nn.Module], x: Tensor, least: int) -> list[float]:
    return clock.race([partial(module, x) for module in modules], least=least, warm_up=2)
