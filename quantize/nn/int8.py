"""Int8Linear: a linear layer that stores int8 and computes in int8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantize import surgery
from quantize.nn import Operands, PackedLayer, dtype_name, dtype_named, is_transposed
from quantize.nn import int8_kernels as kernels


@surgery.builder
class Int8Linear(PackedLayer):
    """`y = x W^T + b` with W in int8, for inference: x `[..., in_features]` of any float dtype, y
    the same.

    The state is plain tensors: `packed` int8 `[out, in]`, `scale` float32 `[out]` (which stays
    float32 under `.half()`), `bias` `[out]` or None. `weight` reads as `packed * scale`, in the
    dtype of the layer that was quantized. Each row of x is quantized when it arrives (see
    `kernels`). No gradient flows through the layer.
    """

    packed: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(dtype, "cpu" if packed.is_meta else packed.device)
        self.out_features, self.in_features = packed.shape
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None) -> Int8Linear:
        """Quantize a float weight `[out, in]`; the bias is kept as it is."""
        own_bias = None if bias is None else bias.detach().clone()
        new = cls(*kernels.quantize_weight(weight), own_bias, dtype=weight.dtype)
        surgery.record(
            new,
            "Int8Linear",
            in_features=new.in_features,
            out_features=new.out_features,
            bias=None if bias is None else dtype_name(bias.dtype),
            dtype=dtype_name(weight.dtype),
        )
        return new

    @classmethod
    def rebuild(
        cls,
        module: nn.Module,
        in_features: int,
        out_features: int,
        bias: str | None,
        dtype: str = "float32",
    ) -> Int8Linear:
        """An empty layer (on the meta device) in place of `module`, for a file's tensors."""
        new = cls(
            torch.empty(out_features, in_features, dtype=torch.int8, device="meta"),
            torch.empty(out_features, dtype=torch.float32, device="meta"),
            None
            if bias is None
            else torch.empty(out_features, dtype=dtype_named(bias), device="meta"),
            dtype=dtype_named(dtype),
        )
        new.transposed = is_transposed(module)
        return new.train(module.training)

    def contradiction(self) -> str | None:
        """See `surgery.contradiction`."""
        shapes = {
            "packed": (self.out_features, self.in_features),
            "scale": (self.out_features,),
            "bias": (self.out_features,),
        }
        return surgery.mismatch(self, shapes, {"packed": torch.int8, "scale": torch.float32})

    def forward(self, x: Tensor) -> Tensor:
        buffers: Any = self._buffers  # read without nn.Module's __getattr__: it costs a microsecond
        return kernels.linear(x, buffers["packed"], buffers["scale"], buffers["bias"])

    def dense_weight(self) -> Tensor:
        return self.packed.float() * self.scale.unsqueeze(-1)

    def weight_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def operands(self) -> Operands:
        return Operands(self.packed, self.bias, self.scale)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )
