"""The arithmetic of a dynamic int8 linear layer, on tensors.

    q[m, k] = round_half_even(x[m, k] * 127 / a[m])        a[m] = max_k |x[m, k]|      one activation scale per row (token)
    y[m, n] = (float32(sum_k q[m, k] w[n, k]) * s[n]) * (a[m] / 127) + b[n]

The sum is exact in 32-bit integers, and everything else is one IEEE operation at a time in a fixed order, so every way of
computing it gives the same bits: a row's result depends neither on the other rows of the batch, nor on the CPU, nor on the
kernel. That is why the kernel can be chosen by a stopwatch. Two are enough:

- `int_mm`: `torch._int_mm` (oneDNN; VNNI or AMX instructions where the CPU has them). It reads the plain weight, so there is no
  packed copy that could go stale.
- `float`: the same sum in float32, exact because it is cut so that no partial sum passes 2^24. It is the reference, and the
  fallback where `_int_mm` is wrong (oneDNN saturates 16-bit sums on CPUs without VNNI) or slow.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator

import torch

SWITCH = "QUANTIZE_INT8_KERNEL"
_SMALLEST = 1e-30  # stands for the largest magnitude of a row of zeros, whose scale would else be 0 / 0
_EXACT_WIDTH = 1024  # 1024 * 127 * 127 < 2^24
_CHUNK = 1 << 19  # outputs computed at a time, so that sums are still in the cache when they are scaled
_LEVELS = torch.tensor(127.0)


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[N, K]` of any float dtype to int8 `[N, K]` in -127..127 and one float32 scale per output channel, `[N]`."""
    weight = weight.detach().float()
    scale = weight.abs().amax(1) / 127
    q = torch.where(scale[:, None] > 0, weight / scale[:, None], 0.0).round_().clamp_(-127, 127).to(torch.int8)
    return q.contiguous(), scale


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[M, K]` of fp32, fp16 or bf16 to int8 `[M, K]` and the scale of each row, float32 `[M, 1]`.

    A row with a NaN gets a NaN scale, one with an infinity an infinite scale: their outputs are not finite either.
    """
    largest = x.abs().amax(-1, keepdim=True).float().clamp_min(_SMALLEST)
    q = (x * (127 / largest)).round_().to(torch.int8)
    return q, largest * (1 / 127)


def int_mm(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int8 `[M, K]` times int8 `[N, K]` transposed: int32 `[M, N]`."""
    return torch._int_mm(q, weight.t())


def float_mm(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same sums, exact, by float32 matrix products over at most 1024 columns each: int32 `[M, N]`."""
    total = torch.zeros(q.shape[0], weight.shape[0], dtype=torch.int32, device=q.device)
    for k in range(0, q.shape[1], _EXACT_WIDTH):
        part = q[:, k : k + _EXACT_WIDTH].float() @ weight[:, k : k + _EXACT_WIDTH].float().t()
        total += part.to(torch.int32)
    return total


def scale_sums(sums: torch.Tensor, scale: torch.Tensor, row_scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """int32 `[M, N]`, float32 `[N]` and `[M, 1]`, bias `[N]`: float32 `[M, N]`."""
    y = torch.mul(sums, scale).mul_(row_scale)
    return y if bias is None else y.add_(bias)


def linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x `[..., K]` of a float dtype, int8 weight `[N, K]`, float32 scale `[N]`, bias `[N]`; result `[..., N]` in x's dtype."""
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
    if not traced and x.shape[-1] != weight.shape[1]:
        raise ValueError(f"the last axis of the input is {x.shape[-1]}, but the layer takes {weight.shape[1]} features")
    if not x.dtype.is_floating_point:
        raise TypeError(f"the input must be a floating point tensor, got {x.dtype}")
    rows = x.detach().reshape(-1, x.shape[-1])
    if rows.dtype == torch.float64:
        rows = rows.float()
    if traced:
        y = _rows(int_mm, rows, weight, scale, bias)
    else:
        y = _in_chunks(_kernel(rows, weight), rows, weight, scale, bias)
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def _rows(multiply: Callable[..., torch.Tensor], rows, weight, scale, bias) -> torch.Tensor:
    q, row_scale = quantize_rows(rows)
    return scale_sums(multiply(q, weight), scale, row_scale, bias)


def _in_chunks(multiply: Callable[..., torch.Tensor], rows, weight, scale, bias) -> torch.Tensor:
    step = max(256, _CHUNK // max(weight.shape[0], 1))
    if rows.shape[0] <= step:
        return _rows(multiply, rows, weight, scale, bias)
    return torch.cat([_rows(multiply, part, weight, scale, bias) for part in rows.split(step)])


# Which kernel.

_KERNELS: dict[str, Callable[..., torch.Tensor]] = {"int_mm": int_mm, "reference": float_mm}
_forced: str | None = None
_chosen: dict[tuple, Callable[..., torch.Tensor]] = {}


@contextlib.contextmanager
def kernel(name: str) -> Iterator[None]:
    """Force a kernel (`"int_mm"` or `"reference"`) for the whole process inside a `with` block.

    The environment variable QUANTIZE_INT8_KERNEL does the same for a whole run.
    """
    global _forced
    if name not in _KERNELS:
        raise ValueError(f"kernel must be one of {sorted(_KERNELS)}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _kernel(rows: torch.Tensor, weight: torch.Tensor) -> Callable[..., torch.Tensor]:
    name = _forced or os.environ.get(SWITCH)
    if name:
        if name not in _KERNELS:
            raise ValueError(f"{SWITCH} must be one of {sorted(_KERNELS)}, got {name!r}")
        return _KERNELS[name]
    if rows.device.type != "cpu":  # _int_mm on CUDA takes only some shapes
        return float_mm
    key = (min(rows.shape[0], 64).bit_length(), *weight.shape)
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = _choose(min(rows.shape[0], 64), *weight.shape)
    return found


def _choose(m: int, n: int, k: int) -> Callable[..., torch.Tensor]:
    """`int_mm` if it is exact on the hardest numbers of this shape, and not the slower one."""
    if 0 in (m, n, k):
        return float_mm
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=generator)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
    q[0], weight[0], weight[-1] = 127, 127, -127  # the largest sums: where 16-bit accumulators saturate
    if not torch.equal(int_mm(q, weight), float_mm(q, weight)):
        return float_mm
    return int_mm if _seconds(int_mm, q, weight) <= _seconds(float_mm, q, weight) else float_mm


def _seconds(multiply: Callable[..., torch.Tensor], q: torch.Tensor, weight: torch.Tensor) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        multiply(q, weight)
        times.append(time.perf_counter() - start)
    return min(times)
