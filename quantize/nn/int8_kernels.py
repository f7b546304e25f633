"""The arithmetic of a dynamic int8 linear layer, on tensors.

    a[m] = max_k |x[m, k]| / 127        one activation scale per row (token), when the row arrives
    q[m, k] = round_half_even(x[m, k] / a[m])
    y[m, n] = (float32(sum_k q[m, k] w[n, k]) * s[n]) * a[m] + b[n]

The sum is exact in 32-bit integers, and everything else is one IEEE operation at a time in a fixed
order, so every way of computing it gives the same bits: a row's result depends neither on the other
rows of the batch, nor on the CPU, nor on the kernel. That is why the kernel can be chosen by a
stopwatch:

- `int_mm`: `torch._int_mm`. It reads the plain weight and has the least overhead: for few rows, and
  inside a traced graph.
- `onednn`: `onednn.qlinear_pointwise` on a packed copy of the weight; it multiplies by s on the way
  out: for many rows. Its activations are unsigned, q + 128: with signed ones some CPUs fall into a
  loop that takes minutes.
- `reference`: float32 products, exact because they are cut so that no partial sum passes 2^24. It
  also is what runs where the other two are wrong (oneDNN saturates 16-bit sums on CPUs without
  VNNI) or slow, and on CUDA.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from quantize import clock

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]

SWITCH = "QUANTIZE_INT8_KERNEL"
_SMALLEST = 1e-30  # scale of a row of zeros
_UP = (
    1 + 2**-8
)  # more than bfloat16 can round a scale down by: the largest value still fits into 127 steps
_EXACT_WIDTH = 1024  # 1024 * 127 * 127 < 2^24
_MANY = 1024  # rows above which a kernel's rank no longer changes
_CHUNK = 1 << 17  # activations quantized at a time, so that the steps find them in the cache


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[N, K]` of any float dtype to int8 `[N, K]` in -127..127 and one float32 scale per output
    channel, `[N]`.
    """
    weight = weight.detach().float()
    scale = weight.abs().amax(1) / 127
    q = (
        torch.where(scale[:, None] > 0, weight / scale[:, None], 0.0)
        .round_()
        .clamp_(-127, 127)
        .to(torch.int8)
    )
    return q.contiguous(), scale


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[M, K]` of a float dtype to int8 `[M, K]` and the scale of each row `[M, 1]`: bfloat16 for
    bfloat16 rows, else float32.

    A row with a NaN gets a NaN scale, one with an infinity an infinite scale: their outputs are not
    finite either.
    """
    row_scale = x.abs().amax(-1, keepdim=True)
    if row_scale.dtype is not torch.float32:
        row_scale = row_scale.float()
    row_scale.mul_(1 / 127).clamp_min_(_SMALLEST)
    if x.dtype is torch.bfloat16:
        row_scale = row_scale.mul_(_UP).bfloat16()
        return (x / row_scale.float()).round_().to(torch.int8), row_scale
    return (x / row_scale).round_().to(torch.int8), row_scale


def _quantize_many_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows`, a cache-sized piece at a time."""
    m, k = x.shape
    q = torch.empty(m, k, dtype=torch.int8, device=x.device)
    row_scale = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    step = min(m, max(16, _CHUNK // k))
    scratch = torch.empty(step, k, dtype=torch.float32, device=x.device)
    for i in range(0, m, step):
        part, scaled, s = x[i : i + step], scratch[: min(step, m - i)], row_scale[i : i + step]
        if part.dtype is not torch.float32:
            part = scaled.copy_(part)
        torch.maximum(part.amax(-1, keepdim=True), part.amin(-1, keepdim=True).neg_(), out=s)
        s.mul_(1 / 127).clamp_min_(_SMALLEST)
        if x.dtype is torch.bfloat16:
            s.copy_(s.mul_(_UP).bfloat16())
        q[i : i + step] = torch.div(part, s, out=scaled).round_()
    return q, row_scale.bfloat16() if x.dtype is torch.bfloat16 else row_scale


# Kernels: int8 `[M, K]`, int8 weight `[N, K]`, float32 scale `[N]` to the scaled sums `[M, N]`,
# float32 or rounded to bfloat16.


def int_mm(
    q: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    return torch.mul(torch._int_mm(q, weight.t()), scale).to(dtype)


def onednn(
    q: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    packed, zero_points = _pack(weight)
    unsigned = q.view(torch.uint8).bitwise_xor(128)
    return torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, 128, packed, scale, zero_points, None, 1.0, 0, dtype, "none", [], ""
    )


def reference(
    q: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    total = torch.zeros(q.shape[0], weight.shape[0], dtype=torch.int32, device=q.device)
    for k in range(0, q.shape[1], _EXACT_WIDTH):
        part = q[:, k : k + _EXACT_WIDTH].float() @ weight[:, k : k + _EXACT_WIDTH].float().t()
        total += part.to(torch.int32)
    return torch.mul(total, scale).to(dtype)


_packs = (
    WeakTensorKeyDictionary()
)  # outside the modules: a copy, a move or a file can't carry a stale one along
_packs_lock = threading.Lock()


def _pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight in oneDNN's layout, kept until the tensor dies or changes."""
    state = (weight._version, weight.data_ptr())
    with _packs_lock:
        found = _packs.get(weight)
        if found is None or found[0] != state:
            packed = torch.ops.onednn.qlinear_prepack(weight, None)
            found = _packs[weight] = (
                state,
                packed,
                torch.zeros(weight.shape[0], dtype=torch.int64),
            )
    return found[1:]


# torch.compile's own code reads `int_mm`'s 32-bit sums from memory: on many rows oneDNN's bfloat16
# ones take less time in all. A graph that leaves this process (torch.export, TorchScript) holds
# stock operations only.
_MANY_TO_CALL = 64
_library = torch.library.Library("quantize", "DEF")
_library.define("int8_sums(Tensor q, Tensor weight, Tensor scale, ScalarType dtype) -> Tensor")


@torch.library.impl(_library, "int8_sums", "CPU")
def _int8_sums(
    q: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return _choose(q, weight)(q, weight, scale, dtype)


@torch.library.register_fake("quantize::int8_sums")
def _fake_int8_sums(
    q: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return q.new_empty(q.shape[0], weight.shape[0], dtype=dtype)


# The layer.


def linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x `[..., K]` of a float dtype, int8 weight `[N, K]`, float32 scale `[N]`, bias `[N]`; result
    `[..., N]` in x's dtype.
    """
    between = torch.bfloat16 if x.dtype is torch.bfloat16 else torch.float32
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        q, row_scale = quantize_rows(x.detach().reshape(-1, weight.shape[1]))
        stays_here = (
            torch.compiler.is_dynamo_compiling()
            and not torch.compiler.is_exporting()
            and x.device.type == "cpu"
        )
        sums = (
            torch.ops.quantize.int8_sums if stays_here and q.shape[0] >= _MANY_TO_CALL else int_mm
        )
        y = sums(q, weight, scale, between) * row_scale
        y = y if bias is None else y + bias
        return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"the last axis of the input is {x.shape[-1]}, but the layer takes "
            f"{weight.shape[1]} features"
        )
    q, row_scale = _rows_of(x)
    y = _choose(q, weight)(q, weight, scale, between).mul_(row_scale)
    if bias is not None:
        y.add_(bias)
    if x.dtype is not between:
        y = y.to(x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


class _Last(threading.local):
    """The input that this thread quantized last: query, key and value (gate and up) projections
    take the same one.
    """

    x: Callable[[], torch.Tensor | None] = staticmethod(lambda: None)
    version: int = -1
    rows: tuple[torch.Tensor, torch.Tensor] | None = None


_last = _Last()


def _rows_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` of x `[..., K]`, remembered until the next tensor comes or this one
    changes.
    """
    counted = not x.is_inference()  # under inference_mode nobody counts changes
    if counted and _last.x() is x and _last.version == x._version:
        return _last.rows
    if not x.is_floating_point():
        raise TypeError(f"the input must be a floating point tensor, got {x.dtype}")
    rows = (x.detach() if x.requires_grad else x).reshape(-1, x.shape[-1])
    if rows.dtype is torch.float64:
        rows = rows.float()
    found = (_quantize_many_rows if rows.numel() > _CHUNK else quantize_rows)(rows)
    if counted:
        _last.x, _last.version, _last.rows = weakref.ref(x), x._version, found
    return found


# Which kernel.

_KERNELS: dict[str, Kernel] = {"int_mm": int_mm, "onednn": onednn, "reference": reference}
_forced: str | None = os.environ.get(SWITCH) or None
_chosen: dict[tuple[int, int, int], Kernel] = {}


@contextlib.contextmanager
def kernel(name: str) -> Iterator[None]:
    """Force a kernel (`"int_mm"`, `"onednn"` or `"reference"`) for the whole process inside a
    `with` block.

    The environment variable QUANTIZE_INT8_KERNEL does the same for a whole run.
    """
    global _forced
    _named(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _named(name: str) -> Kernel:
    if name not in _KERNELS:
        raise ValueError(f"{SWITCH} must be one of {', '.join(_KERNELS)}, got {name!r}")
    return _KERNELS[name]


def _choose(q: torch.Tensor, weight: torch.Tensor) -> Kernel:
    """The kernel for this shape, found by a trial when the shape first comes."""
    if _forced:
        return _named(_forced)
    if (
        type(q) is not torch.Tensor
    ):  # a stand-in without values, which some tracer sends through the model
        return int_mm
    n, k = weight.shape
    key = (min(q.shape[0], _MANY).bit_length(), n, k)
    found = _chosen.get(key)
    if found is None:
        if q.device.type != "cpu":  # CUDA's _int_mm takes only some shapes
            return reference
        found = _chosen[key] = _fastest(min(q.shape[0], _MANY), min(n, 1024), k)
    if (
        found is onednn and weight.is_inference()
    ):  # its changes can't be seen, so it can't have a packed copy
        return int_mm
    return found


@torch.no_grad()
def _fastest(m: int, n: int, k: int) -> Kernel:
    """The fastest kernel among those that are exact on the hardest numbers: sums where 16-bit
    accumulators saturate.

    A clock on a busy machine lies, so a kernel must win clearly against the one that should be
    faster.
    """
    if 0 in (m, n, k):
        return reference
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=generator)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
    q[0], weight[0], weight[-1] = 127, 127, -127
    scale = torch.rand(n, generator=generator, dtype=torch.float32)
    handicap = {int_mm: 1.0, onednn: 1.25} if m < 256 else {int_mm: 1.25, onednn: 1.0}
    arguments = (q, weight, scale, torch.float32)
    expected, exact = reference(*arguments), []
    for candidate in handicap:
        with contextlib.suppress(RuntimeError):  # an operation this build or CPU doesn't have
            if torch.equal(candidate(*arguments), expected):
                exact.append(candidate)
    handicap[reference] = 3.0
    exact.append(reference)

    def costs(kernels: list[Kernel], least: int) -> dict[Kernel, float]:
        calls = [partial(kernel, *arguments) for kernel in kernels]
        seconds = clock.race(calls, least=least, warm_up=0)
        return {k: handicap[k] * s for k, s in zip(kernels, seconds, strict=True)}

    once = costs(exact, 1)
    hopeful = [kernel for kernel in exact if once[kernel] <= 4 * min(once.values())]
    found = costs(hopeful, 20 if m < 64 else 4) if len(hopeful) > 1 else once
    return min(found, key=found.__getitem__)
