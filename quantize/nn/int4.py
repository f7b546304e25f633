"""4-bit weights for decoding one token at a time, where a layer's time is the time to read its
weight.

In an `Int4Linear`, which `compression/int4.py` puts in, groups of `group_size` weights of a row
share a scale and a zero point, and activations stay float. With few rows the stock kernel
`_weight_int4pack_mm_for_cpu` multiplies the 4-bit weight as it is, in bfloat16; with many the
weight is widened, to bfloat16 where the CPU multiplies that, and multiplied as usual.

With calibration batches the rounding is GPTQ's (Frantar et al., arXiv 2210.17323): each column's
rounding error is made up for by the columns after it, as far as the layer's inputs are correlated.
Without them, each weight goes to its nearest value. A decoder's native passes take the same weights
with inputs in 8 bits, a step for every 32 (see `run/decoding/int4.h`). Left out: other bit widths,
embeddings.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from quantize import surgery
from quantize.host import native_bf16
from quantize.nn import (
    Operands,
    PackedLayer,
    dtype_name,
    dtype_named,
    gptq,
    is_traced,
    is_transposed,
)
from quantize.nn.protocol import copied, dtype_of, empty, empty_bias
from quantize.nn.straight import straight

GROUP_SIZES = (32, 64, 128, 256)
_FEW_ROWS = 128  # above, widening the weight once is cheaper than the kernel's product


def quantize_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round to the nearest: `[N, K]` to values 0..15 `[N, K]` (uint8), and bfloat16 scale and zero
    `[N, K / group_size]`.

    The value v of a group stands for (v - 8) * scale + zero.
    """
    groups = weight.unflatten(1, (-1, group_size))
    scale, zero = _grid(groups)
    return _to_grid(groups, scale.unsqueeze(-1), zero.unsqueeze(-1)).flatten(1), scale, zero


def quantize_groups_gptq(
    weight: Tensor, group_size: int, second_moment: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `quantize_groups`, but with a small error of `x W^T` for inputs x with E[x x^T] =
    `second_moment`, `[K, K]` (see `gptq`).
    """
    scales, zeros = [], []

    def grid(group: Tensor) -> gptq.Rounding:
        scale, zero = _grid(group[:, None])  # [N, 1], of the weights as corrected so far
        scales.append(scale)
        zeros.append(zero)
        return lambda column: _from_grid(_to_grid(column, scale, zero), scale, zero)

    dense = gptq.rounded(weight.float(), second_moment, group_size, grid)
    scale, zero = torch.cat(scales, 1), torch.cat(zeros, 1)
    groups = dense.unflatten(1, (-1, group_size))
    return _to_grid(groups, scale.unsqueeze(-1), zero.unsqueeze(-1)).flatten(1), scale, zero


def _grid(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero (bfloat16, without the last axis) of a 16-value grid over each group of the
    last axis.
    """
    low, high = groups.float().aminmax(dim=-1)
    scale = ((high - low) / 15).clamp_min(torch.finfo(torch.bfloat16).tiny).bfloat16()
    return scale, (low + 8 * scale.float()).bfloat16()


def _to_grid(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (
        ((weight.float() - zero.float()) / scale.float() + 8).round_().clamp_(0, 15).to(torch.uint8)
    )


def _from_grid(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (values.float() - 8) * scale.float() + zero.float()


@surgery.builder
class Int4Linear(PackedLayer):
    """`y = x W^T + b` with 4-bit W: x `[..., in_features]` of any float dtype, y the same. For
    inference.

    State: `packed` uint8 `[out, in / 2]` (column 2i in the low four bits), `scale` and `zero`
    bfloat16 `[out, in / group_size]` (they stay bfloat16 under `.half()`), `bias` `[out]` or None.
    `weight` reads as the float weight that they stand for.
    """

    exact = ("scale", "zero")
    dtypes: Mapping[str, torch.dtype] = {
        "packed": torch.uint8,
        "scale": torch.bfloat16,
        "zero": torch.bfloat16,
    }
    packed: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        scale: Tensor,
        zero: Tensor,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(dtype, packed=packed, scale=scale, zero=zero, bias=bias)
        self.out_features, self.in_features = packed.shape[0], 2 * packed.shape[1]
        self.group_size = self.in_features // scale.shape[1]

    @classmethod
    def from_linear(
        cls, layer: Any, group_size: int, second_moment: Tensor | None = None
    ) -> Int4Linear:
        """Quantize `layer` (an `nn.Linear`, or a Conv1D); with the second moment of its inputs,
        `[in, in]`, by GPTQ.
        """
        weight = layer.weight.detach()
        dtype, weight = weight.dtype, (weight.t() if is_transposed(layer) else weight).float()
        if second_moment is None:
            values, scale, zero = quantize_groups(weight, group_size)
        else:
            values, scale, zero = quantize_groups_gptq(weight, group_size, second_moment)
        bias = copied(layer.bias)
        new = cls(values[:, ::2] | values[:, 1::2] << 4, scale, zero, bias, dtype=dtype)
        new.transposed = is_transposed(layer)
        surgery.record(
            new,
            "Int4Linear",
            in_features=new.in_features,
            out_features=new.out_features,
            group_size=group_size,
            bias=dtype_of(bias),
            dtype=dtype_name(dtype),
        )
        return new

    @classmethod
    def rebuild(
        cls,
        module: nn.Module,
        in_features: int,
        out_features: int,
        group_size: int,
        bias: str | None,
        dtype: str = "float32",
    ) -> Int4Linear:
        """An empty layer (on the meta device) in place of `module`, for a file's tensors."""
        packed = empty(torch.uint8, out_features, in_features // 2)
        grid = empty(torch.bfloat16, out_features, in_features // group_size)
        own_bias = empty_bias(bias, out_features)
        new = cls(packed, grid, grid.clone(), own_bias, dtype=dtype_named(dtype))
        new.transposed = is_transposed(module)
        return new.train(module.training)

    def contradiction(self) -> str | None:
        """See `surgery.contradiction`."""
        inputs, group = self.in_features, self.group_size
        if group not in GROUP_SIZES or inputs % group:
            allowed = f"none of {GROUP_SIZES} that divide in_features={inputs!r}"
            return f"its group_size={group!r} is {allowed}"
        return super().contradiction()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        outputs, inputs = (self.out_features,), self.in_features
        grid = (*outputs, inputs // self.group_size)
        return {"packed": (*outputs, inputs // 2), "scale": grid, "zero": grid, "bias": outputs}

    def forward(self, input: Tensor) -> Tensor:
        if is_traced():
            return self._in_float(input)
        self._check(input)
        return straight(self._quick, self._in_float, [input])

    def _in_float(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dense_weight().to(x.dtype), bias)

    def _quick(self, x: Tensor) -> Tensor:
        rows = x.detach().reshape(-1, self.in_features)
        few = 0 < rows.shape[0] <= _FEW_ROWS
        if rows.device.type == "cpu" and few and self.out_features % 16 == 0:
            packed, grid = self.for_kernel()
            halves = rows.bfloat16().contiguous()  # the kernel reads rows one after another
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(
                halves, packed, self.group_size, grid
            ).to(x.dtype)
            y = y if self.bias is None else y.add_(self.bias)
        elif not few and rows.dtype is torch.float32 and native_bf16(rows.device):
            y = F.linear(rows.bfloat16(), self._widened()).to(x.dtype)
            y = y if self.bias is None else y.add_(self.bias)
        else:
            y = self._in_float(rows)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _check(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(f"the input must be a floating point tensor, got {x.dtype}")
        if x.shape[-1] != self.in_features:
            given = f"the last axis of the input is {x.shape[-1]}"
            raise ValueError(f"{given}, but the layer takes {self.in_features} features")

    def values(self) -> Tensor:
        """The 4-bit values, uint8 `[out, in]` in 0..15."""
        return torch.stack((self.packed & 15, self.packed >> 4), -1).flatten(1)

    def dense_weight(self) -> Tensor:
        groups = self.values().unflatten(1, (-1, self.group_size))
        return _from_grid(groups, self.scale.unsqueeze(-1), self.zero.unsqueeze(-1)).flatten(1)

    def weight_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def operands(self) -> Operands:
        return Operands(self.packed, self.bias, self.scale, self.zero, self.group_size)

    def _widened(self) -> Tensor:
        """The weight as bfloat16 `[out, in]`. The bits 0x4300 + v are the number 128 + v: a byte is
        two numbers quickly.
        """
        pairs = self.packed.to(torch.int32)
        pairs = (pairs & 15).bitwise_or_((pairs & 240) << 12).bitwise_or_(0x43004300)
        values = pairs.view(torch.bfloat16).sub_(136)
        # A product with zeros and ones repeats each column exactly, in half the time of an operator
        # that broadcasts.
        groups = torch.eye(self.scale.shape[1], dtype=torch.bfloat16, device=pairs.device)
        groups = groups.repeat_interleave(self.group_size, 1)
        return torch.addcmul(self.zero @ groups, values, self.scale @ groups)

    def for_kernel(self) -> tuple[Tensor, Tensor]:
        """Weight and grid in the kernel's layout, kept until one of the tensors dies or changes."""
        tensors = (self.packed, self.scale, self.zero)
        state = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
        with _packs_lock:
            found = _packs.get(self.packed)
            if found is None or found[0] != state:
                packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(self.values().int(), 1)
                grid = torch.stack(
                    (self.scale.t(), self.zero.t()), -1
                ).contiguous()  # [in / group_size, out, 2]
                found = _packs[self.packed] = (state, packed, grid)
        return found[1:]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.group_size}"
        )


# outside the modules: a copy, a move or a file can't carry a stale one along
_packs = WeakTensorKeyDictionary()
_packs_lock = threading.Lock()
