"""Products of int8 matrices in stock PyTorch, each exact: `int_mm`, `onednn`, `reference`.

They take int8 q `[M, K]` and weight `[N, K]` and give `sum_k q w` as integers, `[M, N]`. One that
can't on this CPU raises RuntimeError.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Product = Callable[[Tensor, Tensor], Tensor]
Part = tuple[int, Tensor, Tensor]  # number of inputs, their weights packed, zero points

# A sum of products of one factor up to 255 fits 32 bits for so many inputs, whatever the weights.
MOST_INPUTS = 1 << 16
_EXACT_WIDTH = 1024  # 1024 * 128 * 127 < 2^24
_EXACT_SUM = 1 << 24  # integers that float32 holds


def int_mm(q: Tensor, weight: Tensor) -> Tensor:
    """`torch._int_mm`. It reads the plain weight and has the least overhead: for few rows, and
    inside a traced graph.
    """
    return torch._int_mm(q, weight.t())


def onednn(q: Tensor, weight: Tensor) -> Tensor:
    """oneDNN on a packed copy of the weight, for many rows.

    Its activations are unsigned, q + 128: with signed ones some CPUs fall into a loop that takes
    minutes. It gives float32, so the inputs are cut where a sum could pass 2^24.

    Raises: RuntimeError: on a CPU whose sums of two products are cut off at 16 bits.
    """
    if not onednn_is_exact():
        raise RuntimeError("onednn: this CPU has no VNNI, and cuts sums off at 16 bits")
    return _onednn(q, weight)


@functools.cache
def onednn_is_exact() -> bool:
    """Does oneDNN add products of bytes without a loss here? False too where a build has none."""
    q, weight = torch.full((4, 64), 127, dtype=torch.int8), torch.full((16, 64), 127).char()
    try:
        return torch.equal(_onednn(q, weight), reference(q, weight))
    except (RuntimeError, AttributeError):
        return False


def _onednn(q: Tensor, weight: Tensor) -> Tensor:
    unsigned = q.view(torch.uint8).bitwise_xor(128)
    outputs = weight.shape[0]
    scale = torch.ones(outputs, dtype=torch.float32)
    total = torch.zeros(q.shape[0], outputs, dtype=torch.int32)
    parts = _parts(weight)
    columns = unsigned.split([width for width, *_ in parts], 1)
    for x, (_, packed, zeros) in zip(columns, parts, strict=True):
        settings = None, 1.0, 0, torch.float32, "none", [], ""
        part = torch.ops.onednn.qlinear_pointwise(x, 1.0, 128, packed, scale, zeros, *settings)
        total += part.to(torch.int32)
    return total


def reference(q: Tensor, weight: Tensor) -> Tensor:
    """float32 products, exact because they are cut so that no partial sum passes 2^24.

    It runs where the others are wrong (oneDNN saturates 16-bit sums on CPUs without VNNI) or slow,
    on CUDA, and for more inputs than 32-bit sums can hold.
    """
    rows, inputs = q.shape
    dtype = torch.int32 if inputs <= MOST_INPUTS else torch.int64
    total = torch.zeros(rows, weight.shape[0], dtype=dtype, device=q.device)
    for k in range(0, inputs, _EXACT_WIDTH):
        part = q[:, k : k + _EXACT_WIDTH].float() @ weight[:, k : k + _EXACT_WIDTH].float().t()
        total = total + part.to(dtype)
    return total


PRODUCTS: dict[str, Product] = {"int_mm": int_mm, "onednn": onednn, "reference": reference}


# ------------------------------------------------------------------------------------------------
# what is kept of a weight


@dataclass
class Kept:
    """What was made of one weight; valid until the weight changes."""

    state: tuple[int, int] | None
    sums: Tensor
    parts: list[Part] | None = None


# Outside the modules: a copy, a move or a file can't carry a stale one along.
_kept = WeakTensorKeyDictionary()
_lock = threading.Lock()


def sums(weight: Tensor) -> Tensor:
    """`[N]`: the sum of each output's weights, kept until the weight dies or changes."""
    return _keep(weight).sums


def sum_weights(weight: Tensor) -> Tensor:
    """`[N]`: the sum of each output's weights, computed."""
    dtype = torch.int32 if weight.shape[1] <= MOST_INPUTS else torch.int64
    return weight.sum(1, dtype=dtype)


def _keep(weight: Tensor) -> Kept:
    if weight.is_inference():  # its changes can't be seen
        return Kept(None, sum_weights(weight))
    state = (weight._version, weight.data_ptr())
    with _lock:
        found = _kept.get(weight)
        if found is None or found.state != state:
            found = _kept[weight] = Kept(state, sum_weights(weight))
    return found


def _parts(weight: Tensor) -> list[Part]:
    kept = _keep(weight)
    if kept.parts is None:
        width = _exact_width(weight)
        zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
        kept.parts = []
        for columns in weight.split(width, 1):
            packed = torch.ops.onednn.qlinear_prepack(columns.contiguous(), None)
            kept.parts.append((columns.shape[1], packed, zeros))
    return kept.parts


def _exact_width(weight: Tensor) -> int:
    """The most inputs at a time for which no sum of weights times 255 reaches 2^24."""
    size = weight.short().abs()
    width = weight.shape[1]
    while max(int(part.sum(1).max()) for part in size.split(width, 1)) * 255 >= _EXACT_SUM:
        width = (width + 1) // 2
    return width
