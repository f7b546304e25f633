"""The dynamic int8 linear layer in stock operations: what `int8_kernels` falls back to, and what a
recorded graph is made of.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from quantize.native.outliers import Outliers
from quantize.nn import int8_products as products
from quantize.nn.elementary import ACTIVATIONS
from quantize.nn.int8_products import PRODUCTS, int_mm
from quantize.nn.int8_rows import CHUNK, Rows, quantize_many_rows, quantize_rows

# x [..., K], int8 weight [N, K], float32 scale [N], bias [N] or None, outliers or None, and the
# name of an activation or None, to y [..., N] in x's dtype
Kernel = Callable[..., Tensor]


def _results(
    total: Tensor,
    rows: Rows,
    scale: Tensor,
    bias: Tensor | None,
    x: Tensor,
    outliers: Outliers | None,
) -> Tensor:
    """Of the integer sums; with the products of the outlier channels of x `[M, K]`, if any."""
    y = torch.mul(total, scale).mul_(rows.step)
    if outliers is not None:
        values = x.float().index_select(1, outliers.channels)  # [M, C]
        for value, kept in zip(values.unbind(1), outliers.kept, strict=True):
            y = y + value.unsqueeze(1) * kept
    return y if bias is None else y.add_(bias.float())


def stock(
    product: products.Product,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    outliers: Outliers | None = None,
    activation: str | None = None,
) -> Tensor:
    """The layer around one of the products in `int8_products`."""
    flat = _flat(x)
    if outliers is None:
        rows = _rows_of(x)
    else:
        rows = quantize_many_rows(flat.float() * outliers.factor)
    total = product(rows.q, weight).addcmul_(rows.shift, products.sums(weight))
    y = _results(total, rows, scale, bias, flat, outliers)
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def in_graph(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    sums: Tensor,
    outliers: Outliers | None = None,
    activation: str | None = None,
) -> Tensor:
    """Stock operations, for a graph that is recorded. sums: int32 `[N]`, of each output's
    weights.
    """
    flat = x.detach().reshape(-1, weight.shape[1])
    rows = quantize_rows(flat if outliers is None else flat.float() * outliers.factor)
    total = int_mm(rows.q, weight).add(rows.shift * sums)
    y = _results(total, rows, scale, bias, flat, outliers)
    if activation is not None:
        y = IN_GRAPH[activation](y)
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


# Torch's own activations, by name.
IN_GRAPH: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


STOCK: dict[str, Kernel] = {name: partial(stock, product) for name, product in PRODUCTS.items()}


class _Last(threading.local):
    """The input that this thread quantized last: query, key and value (gate and up) projections
    take the same one.
    """

    x: Callable[[], Tensor | None] = staticmethod(lambda: None)
    version: int = -1
    rows: Rows | None = None


_last = _Last()


def _rows_of(x: Tensor) -> Rows:
    """`quantize_rows` of x `[..., K]`, remembered until the next tensor comes or this one
    changes.
    """
    counted = not x.is_inference()  # under inference_mode nobody counts changes
    if counted and _last.x() is x and _last.version == x._version and _last.rows is not None:
        return _last.rows
    rows = _flat(x)
    found = (quantize_many_rows if rows.numel() > CHUNK else quantize_rows)(rows)
    if counted:
        _last.x, _last.version, _last.rows = weakref.ref(x), x._version, found
    return found


def _flat(x: Tensor) -> Tensor:
    """x `[..., K]` as rows `[M, K]` without a history."""
    if not x.is_floating_point():
        raise TypeError(f"the input must be a floating point tensor, got {x.dtype}")
    return (x.detach() if x.requires_grad else x).reshape(-1, x.shape[-1])
