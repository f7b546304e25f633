"""Int8OutlierLinear: an int8 layer a few of whose input channels count in float."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantize import surgery
from quantize.native.outliers import Outliers, contradiction
from quantize.nn import Operands, dtype_named
from quantize.nn import int8_kernels as kernels
from quantize.nn.int8 import Int8Linear, empties
from quantize.nn.protocol import copied, empty


@surgery.builder
class Int8OutlierLinear(Int8Linear):
    """An `Int8Linear` for inputs of which a few channels hold most of the energy.

    Those channels, up to 4, are multiplied in float; the others are multiplied by `factor` before a
    row is quantized, and the columns of the weight were divided by it (0 for the channels in
    float). `factor` float32 `[in]`, `channels` int64 `[C]`, `kept` float32 `[C, out]`; the rest is
    as in `Int8Linear`.

    Source: LLM.int8() (Dettmers et al., arXiv 2208.07339), SmoothQuant (Xiao et al., arXiv
    2211.10438).
    """

    exact = ("scale", "factor", "kept")

    factor: Tensor
    channels: Tensor
    kept: Tensor

    def __init__(
        self,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        outliers: Outliers,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(packed, scale, bias, dtype=dtype, **outliers._asdict())

    @classmethod
    def from_outliers(
        cls, weight: Tensor, bias: Tensor | None, factor: Tensor, channels: Tensor
    ) -> Int8OutlierLinear:
        """Quantize a float weight `[out, in]`.

        Args:
            weight, bias: of the float layer.
            factor: float32 [in], above 0, of the inputs; what `channels` have isn't used.
            channels: int64 [C], those that count in float.
        """
        factor, channels = factor.to(weight.device), channels.to(weight.device)
        dense = weight.detach().float()
        kept = dense.t()[channels].contiguous()
        rest = dense / factor
        rest[:, channels] = 0
        own = factor.float().clone()
        own[channels] = 0
        outliers = Outliers(own, channels.clone(), kept)
        common = *kernels.quantize_weight(rest), copied(bias)
        new = cls(*common, outliers, dtype=weight.dtype)
        new.note(outliers=len(channels))
        return new

    @classmethod
    def rebuild(
        cls,
        module: nn.Module,
        in_features: int,
        out_features: int,
        bias: str | None,
        outliers: int,
        dtype: str = "float32",
        activation: str | None = None,
    ) -> Int8OutlierLinear:
        """An empty layer (on the meta device) in place of `module`, for a file's tensors."""
        apart = Outliers(
            empty(torch.float32, in_features),
            empty(torch.int64, outliers),
            empty(torch.float32, outliers, out_features),
        )
        common = empties(in_features, out_features, bias)
        new = cls(*common, apart, dtype=dtype_named(dtype))
        return new.in_place_of(module, activation)

    def outliers(self) -> Outliers:
        """The channels in float, as the kernels take them."""
        # by dict's own method, which computes no buffer that isn't held
        factor, channels, kept = (dict.__getitem__(self._buffers, n) for n in Outliers._fields)
        return Outliers(factor, channels, kept)

    def contradiction(self) -> str | None:
        """See `surgery.contradiction`."""
        found = super().contradiction()
        if found is None:
            found = contradiction(self.outliers(), self.in_features, self.out_features)
        return found

    def forward(self, input: Tensor) -> Tensor:
        buffers: Any = self._buffers
        own = buffers["packed"], buffers["scale"], buffers["bias"]
        return kernels.linear(input, *own, self.outliers(), self.activation)

    def dense_weight(self) -> Tensor:
        dense = super().dense_weight() * self.factor
        dense[:, self.channels] += self.kept.t()
        return dense

    def operands(self) -> Operands | None:
        """None: it isn't one product of a stored weight."""
        return None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, outliers={self.channels.tolist()}"
