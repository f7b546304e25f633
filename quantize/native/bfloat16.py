"""Norms, rotary positions and gated units of bfloat16 tensors under autocast, forward and back,
each in one native call (bfloat16.cpp).

PyTorch's CPU makes a dozen passes over memory for each of them, which took half of a training step
of a narrow decoder. These compute in float32 and round once. Gradients of gradients aren't there.
Whoever calls them asks `takes` first, and keeps PyTorch's operations for where it says no.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quantize.native import int8, packs
from quantize.native.build import Kernels
from quantize.native.packs import FLOAT, NUMBER, POINTER

_LANES = 16
_IN_ORDER = torch.contiguous_format
_WORTH_THREADS = 1 << 15  # numbers; for fewer no other thread wakes up


@dataclass(frozen=True)
class Functions:
    """What bfloat16.cpp exports."""

    open_library: Callable[[], int]
    norm: Callable[..., None]
    norm_back: Callable[..., None]
    rotate: Callable[..., None]
    gated: Callable[..., None]
    gated_back: Callable[..., None]


def read(library: ctypes.CDLL) -> Functions:
    """The functions of a compiled bfloat16.cpp. Raises OSError for a library that lacks one."""
    sizes = [NUMBER, NUMBER]
    arguments = {
        "norm": [POINTER, POINTER, FLOAT, *sizes, POINTER, POINTER],
        "norm_back": [*[POINTER] * 4, *sizes, POINTER, POINTER],
        "rotate": [*[POINTER] * 5, FLOAT, POINTER],
        "gated": [POINTER, POINTER, NUMBER, POINTER],
        "gated_back": [*[POINTER] * 3, NUMBER, POINTER, POINTER],
    }
    found = Functions(*packs.symbols(library, ("open_library", *arguments), {}))
    for name, types in arguments.items():
        function = getattr(found, name)
        function.argtypes, function.restype = [*types, NUMBER], None
    return found


KERNELS = Kernels(Path(__file__).with_name("bfloat16.cpp"), read)


@functools.cache
def _functions() -> Functions | None:
    """The kernels for the best instruction set; None where there are none."""
    try:
        return KERNELS.best().functions
    except OSError:
        return None


def takes(*tensors: Tensor, parts: int = 1) -> bool:
    """Does autocast compute in bfloat16 here, and can the functions below read these [..., width],
    or each of so many `parts` of their rows?
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if not torch.is_autocast_enabled("cpu"):
        return False
    return all(_fits(one, parts) for one in tensors) and _functions() is not None


def _fits(x: Tensor, parts: int) -> bool:
    plain = x.dtype is torch.bfloat16 and int8.takes(x)
    return plain and x.numel() > 0 and x.shape[-1] % (parts * _LANES) == 0


def _call(name: str, *arguments: Any, size: int) -> None:
    """A function of the library, with pointers for tensors and threads for so many numbers."""
    values = [one.data_ptr() if isinstance(one, Tensor) else one for one in arguments]
    getattr(_functions(), name)(*values, _threads(size))


def _threads(size: int) -> int:
    """OpenMP's threads don't follow a process that forks."""
    return 1 if int8.forked() or size < _WORTH_THREADS else torch.get_num_threads()


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.float().contiguous()
        y, width = torch.empty_like(x), x.shape[-1]
        inverse = torch.empty(x.numel() // width, dtype=torch.float32, device="cpu")
        _call("norm", x, weight, eps, len(inverse), width, y, inverse, size=x.numel())
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        sizes = len(inverse), len(weight)
        to_x, g = torch.empty_like(x), gradient.contiguous()
        threads = _threads(x.numel())  # each has a sum of its own
        to_weight = torch.zeros(threads, len(weight), dtype=torch.float32, device="cpu")
        _call("norm_back", g, x, weight, inverse, *sizes, to_x, to_weight, size=x.numel())
        return to_x, to_weight.sum(0), None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1, torch.empty_like(x, memory_format=_IN_ORDER))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # as a projection gave it: position by position
        cos, sin = ctx.saved_tensors
        to_x = torch.empty_like(gradient.transpose(1, 2), memory_format=_IN_ORDER).transpose(1, 2)
        return _rotated(gradient, cos, sin, -1, to_x), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int, y: Tensor) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    size = (NUMBER * 4)(*x.shape[:3], x.shape[3] // 2)
    strides = (NUMBER * 6)(*x.stride()[:3], *y.stride()[:3])
    _call("rotate", x, size, strides, cos, sin, sign, y, size=x.numel())
    return y


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        _call("gated", gate, up, gate.numel(), y, size=gate.numel())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
        g, count = gradient.contiguous(), gate.numel()
        _call("gated_back", g, gate, up, count, to_gate, to_up, size=count)
        return to_gate, to_up


def norm(x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    """`F.rms_norm` of x, bfloat16 [..., width], where `takes(x)`; weight: [width].

    Raises: ValueError: the weight has another width.
    """
    _check(weight, x.shape[-1:])
    return _Norm.apply(x, weight, torch.finfo(torch.float32).eps if eps is None else eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rope` of x, bfloat16 [B, H, T, D], where `takes(x, parts=2)`; cos, sin: [T, D / 2].

    Raises: ValueError: cos or sin are for other positions or widths.
    """
    for table in (cos, sin):
        _check(table, (x.shape[2], x.shape[3] // 2))
    return _Rotate.apply(x, cos.float().contiguous(), sin.float().contiguous())


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, where `takes(gate, up)`. Raises: ValueError: they differ in shape."""
    _check(up, gate.shape)
    return _Gated.apply(gate, up)


def _check(x: Tensor, shape: Sequence[int]) -> None:
    """The kernel reads memory as these sizes say."""
    if x.shape != torch.Size(shape):
        raise ValueError(f"expected a tensor {list(shape)}, got {list(x.shape)}")
