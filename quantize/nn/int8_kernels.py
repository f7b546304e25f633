"""The arithmetic of a dynamic int8 linear layer, on tensors, and the choice of its kernel.

    low[m], high[m] = min and max over k of x[m, k] and 0     found when the row arrives
    step[m]  = high[m] / 255 - low[m] / 255                   the row's range in 255 steps
    zero[m]  = round(-low[m] / step[m])                       what stands for 0, in 0..255
    q[m, k]  = round(x[m, k] / step[m]) + zero[m]             in 0..255
    y[m, n]  = float32(sum_k (q[m, k] - zero[m]) w[n, k]) * s[n] * step[m] + b[n]

Divisions by 255 and by a step are products with the rounded inverse; halves round to even. A layer
may have a few outlier channels c, which hold most of a row's energy, and a factor f for each
channel:

    x[m, k] above is x[m, k] * f[k], with f = 0 for the outliers
    y[m, n]  = ... * s[n] * step[m] + x[m, c] * kept[c, n] for one c after the other + b[n]

An activation of y may follow, made of such operations too (see `elementary`).

The sum is exact in integers, and everything else is one float32 operation at a time in this order,
rounded to x's dtype in the end. So every way of computing it gives the same bits: a row's result
depends neither on the other rows of the batch, nor on the CPU, nor on the kernel. That is why the
kernel can be chosen by a stopwatch:

- `native`: all of it in one call of compiled C++ (see `quantize.native.int8`).
- `int_mm`, `onednn`, `reference`: stock operations around one of the products in `int8_products`.
  A graph that leaves this process (torch.export, TorchScript) is made of them, with torch's own
  activations.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import handle_torch_function

from quantize import clock
from quantize.native import int8 as native_int8
from quantize.native.outliers import Outliers
from quantize.nn import int8_products as products
from quantize.nn.int8_rows import Rows, quantize_rows, quantize_weight
from quantize.nn.int8_stock import IN_GRAPH, STOCK, Kernel, in_graph
from quantize.nn.straight import derived, straight
from quantize.nn.tape import is_replacing

__all__ = ["Outliers", "Rows", "in_graph", "kernel", "linear", "quantize_rows", "quantize_weight"]

SWITCH = "QUANTIZE_INT8_KERNEL"
_MANY = 1024  # rows above which a kernel's rank no longer changes
_FEW = 16  # rows that a kernel is tried with first
# A kernel that takes so many times as long as the best, and longer than a call with few rows takes
# anyhow, isn't tried further.
_HOPELESS, _CALL_S = 4, 2e-4


def native(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    outliers: Outliers | None = None,
    activation: str | None = None,
) -> Tensor:
    """One call of compiled C++; stock operations for tensors that it can't read. Raises OSError
    where there is no compiled code.
    """
    rest = weight, scale, bias, outliers, activation
    if native_int8.takes(x) and not weight.is_inference():
        if x.dtype in native_int8.KINDS:
            return native_int8.linear(x, *rest)
        if x.dtype is torch.float64:
            return native_int8.linear(x.float(), *rest).double()
    return _choose(x, weight, STOCK)(x, *rest)


KERNELS: dict[str, Kernel] = {"native": native, **STOCK}


# The layer.


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    outliers: Outliers | None = None,
    activation: str | None = None,
) -> Tensor:
    """x `[..., K]` of a float dtype, int8 weight `[N, K]`, float32 scale `[N]`, bias `[N]`; result
    `[..., N]` in x's dtype. activation: of the result, one of `elementary.ACTIVATIONS`.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        leaves = torch.compiler.is_exporting() or not torch.compiler.is_dynamo_compiling()
        if leaves or x.device.type != "cpu":
            sums = weight.sum(1, dtype=torch.int32)
            return in_graph(x, weight, scale, bias, sums, outliers, activation)
        apart = (None, None, None) if outliers is None else outliers
        rest = weight, scale, bias, *apart, activation
        y = torch.ops.quantize.int8_linear(x.detach(), *rest)
        if not (x.requires_grad and torch.is_grad_enabled()):
            return y
        return derived(y, in_float(x, weight, scale, bias, outliers, activation))
    if torch._C._len_torch_function_stack() and is_replacing():
        rest = weight, scale, bias, outliers, activation
        return handle_torch_function(linear, (x, weight), x, *rest)
    if x.requires_grad or x.is_nested or forward_ad._current_level >= 0:
        return _apart(x, weight, scale, bias, outliers, activation)
    if _forced is None:
        y = native_int8.again(x, weight, scale, bias, outliers, activation)
        if y is not None:
            return y
    if torch._C._are_functorch_transforms_active():
        return _apart(x, weight, scale, bias, outliers, activation)
    return _eager(x, weight, scale, bias, outliers, activation)


def in_float(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    outliers: Outliers | None = None,
    activation: str | None = None,
) -> Tensor:
    """What `linear` computes, but for the rounding of x, by torch's own operations."""
    dense = weight.float() * scale.float().unsqueeze(1)
    if outliers is not None:
        dense = dense * outliers.factor.float()
        dense = dense.index_add(1, outliers.channels, outliers.kept.float().t())
    y = F.linear(x.float(), dense, None if bias is None else bias.float())
    return (y if activation is None else IN_GRAPH[activation](y)).to(x.dtype)


def _apart(x: Any, *rest: Any) -> Any:
    """Of x whose derivatives somebody may ask for, or of a nested one: of the rows of all parts at
    once where they lie one after the other, otherwise of each part by itself.
    """
    if not x.is_nested:
        return straight(_linear, in_float, [x], *rest)
    if x.layout is not torch.jagged:
        return torch.nested.as_nested_tensor([linear(part, *rest) for part in x.unbind()])
    y = linear(x.values(), *rest)
    return torch.nested.nested_tensor_from_jagged(y, x.offsets(), x.lengths())


def _linear(x: Tensor, *rest: Any) -> Tensor:
    y = native_int8.again(x, *rest) if _forced is None else None
    return _eager(x, *rest) if y is None else y


def _eager(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    outliers: Outliers | None = None,
    activation: str | None = None,
) -> Tensor:
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"the last axis of the input is {x.shape[-1]}, but the layer takes "
            f"{weight.shape[1]} features"
        )
    chosen = _choose(x, weight, KERNELS)
    y = chosen(x, weight, scale, bias, outliers, activation)
    if chosen is native and _forced is None:
        native_int8.prefer(x, weight, scale, bias, outliers, activation)
    return y


def _operator(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    factor: Tensor | None = None,
    channels: Tensor | None = None,
    kept: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    outliers = None
    if factor is not None and channels is not None and kept is not None:
        outliers = Outliers(factor, channels, kept)
    return _eager(x, weight, scale, bias, outliers, activation)


_library = torch.library.Library("quantize", "DEF")
_library.define(
    "int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor? factor=None, "
    "Tensor? channels=None, Tensor? kept=None, str? activation=None) -> Tensor"
)
_library.impl("int8_linear", _operator, "CPU")


@torch.library.register_fake("quantize::int8_linear")
def _fake_linear(x: Tensor, weight: Tensor, *_: Tensor | str | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


# Which kernel.

_forced: str | None = os.environ.get(SWITCH) or None
# By rows (a power of two), outputs, inputs, and whether native code is among the candidates.
_chosen: dict[tuple[int, int, int, bool], Kernel] = {}


@contextlib.contextmanager
def kernel(name: str) -> Iterator[None]:
    """Force a kernel (`"native"`, `"int_mm"`, `"onednn"` or `"reference"`) for the whole process
    inside a `with` block.

    The environment variable QUANTIZE_INT8_KERNEL does the same for a whole run.
    """
    global _forced
    _named(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def is_free() -> bool:
    """Is no kernel forced?"""
    return _forced is None


def native_allowed() -> bool:
    """Is no kernel but the native one forced?"""
    return not _forced or _named(_forced) is native


def _named(name: str) -> Kernel:
    if name not in KERNELS:
        raise ValueError(f"{SWITCH} must be one of {', '.join(KERNELS)}, got {name!r}")
    return KERNELS[name]


def _choose(x: Tensor, weight: Tensor, kernels: dict[str, Kernel]) -> Kernel:
    """The kernel for this shape, found by a trial when the shape first comes."""
    if _forced and (_named(_forced) is not native or kernels is KERNELS):
        return _named(_forced)
    n, k = weight.shape
    rows = x.numel() // k if k else 0
    key = (min(rows, _MANY).bit_length(), n, k, kernels is KERNELS)
    found = _chosen.get(key)
    if found is not native:
        if kernels is KERNELS and not native_int8.takes(x):
            return _choose(x, weight, STOCK)
        if x.device.type != "cpu" or rows * n == 0 or k > products.MOST_INPUTS:
            return STOCK["reference"]  # CUDA's _int_mm takes only some shapes
        if torch._C._are_functorch_transforms_active():
            return STOCK["reference"]
        if type(x) not in (Tensor, torch.nn.Parameter) or torch._C._len_torch_dispatch_stack():
            return STOCK["int_mm"]  # a tracer sends it through, and nothing can be tried
        if found is None:
            found = _chosen[key] = _fastest(min(rows, _MANY), min(n, 1024), k, kernels)
    if found is STOCK["onednn"] and weight.is_inference():
        return STOCK["int_mm"]  # changes of the weight can't be seen: it can't have a packed copy
    return cast(Kernel, found)  # it is native, or was found above


@torch.inference_mode(False)
@torch.no_grad()
def _fastest(m: int, n: int, k: int, kernels: dict[str, Kernel]) -> Kernel:
    """The fastest kernel among those that are exact on the hardest numbers: sums where 16-bit
    accumulators saturate.

    A clock on a busy machine lies, so a kernel must win clearly against the one that should be
    faster.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, dtype=torch.float32, generator=generator)
    scale = torch.rand(n, generator=generator, dtype=torch.float32)
    common = torch.randn(n, k, dtype=torch.float32, generator=generator)
    common = common.mul_(40).clamp_(-127, 127).to(torch.int8)
    hard = common.clone()
    x[0], hard[0], hard[-1] = 1, 127, -127

    def exact(names: list[str], x: Tensor) -> list[str]:
        expected = STOCK["reference"](x, hard, scale, None)
        return [name for name in names if _gives(expected, kernels[name], x, hard, scale)]

    def costs(names: list[str], x: Tensor, least: int) -> dict[str, float]:
        usual = "int_mm" if m < 256 else "onednn"
        handicap = {"native" if "native" in names else usual: 1.0, "reference": 3.0}
        calls = [partial(_call_anew, kernels[name], x, common, scale) for name in names]
        seconds = clock.race(calls, least=least)  # the uncounted call packs the weight
        return {n: handicap.get(n, 1.25) * s for n, s in zip(names, seconds, strict=True)}

    hopeful = list(kernels)
    for rows in (x[:_FEW], x):
        hopeful = exact(hopeful, rows)
        cost = costs(hopeful, rows, 3)
        most = max(_HOPELESS * min(cost.values()), _CALL_S)
        hopeful = [name for name in hopeful if cost[name] <= most]
    if len(hopeful) > 1:
        cost = costs(hopeful, x, 20 if m < 64 else 4)
    return kernels[min(hopeful, key=cost.__getitem__)]


def _gives(expected: Tensor, candidate: Kernel, *given: Tensor) -> bool:
    """False too where this build or machine doesn't have the kernel."""
    with contextlib.suppress(RuntimeError, OSError):
        return torch.equal(candidate(*given, None), expected)
    return False


def _call_anew(candidate: Kernel, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return candidate(x.view_as(x), weight, scale, None)  # another tensor, quantized again
