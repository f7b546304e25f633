"""Int8Linear: a linear layer that stores int8 and computes in int8."""

from __future__ import annotations

import torch
from torch import nn

from quantize import surgery
from quantize.int8 import kernels


@surgery.builder
class Int8Linear(nn.Module):
    """`y = x W^T + b` with W in int8, for inference: x `[..., in_features]` of any float dtype, y the same.

    The state is plain tensors: `weight` int8 `[out, in]`, `scale` float32 `[out]` (which stays float32 under `.half()`),
    `bias` `[out]` or None. Each row of x is quantized when it arrives (see `kernels`). No gradient flows through the layer.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def from_weight(cls, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Int8Linear:
        """Quantize a float weight `[out, in]`; the bias is kept as it is."""
        new = cls(*kernels.quantize_weight(weight), None if bias is None else bias.detach().clone())
        surgery.record(
            new, "Int8Linear", in_features=new.in_features, out_features=new.out_features, bias=new._dtype_name(bias)
        )
        return new

    @classmethod
    def rebuild(cls, module: nn.Module, in_features: int, out_features: int, bias: str | None) -> Int8Linear:
        """An empty layer (on the meta device) in place of `module`, for a file's tensors."""
        return cls(
            torch.empty(out_features, in_features, dtype=torch.int8, device="meta"),
            torch.empty(out_features, device="meta"),
            None if bias is None else torch.empty(out_features, dtype=getattr(torch, bias), device="meta"),
        ).train(module.training)

    def contradiction(self) -> str | None:
        """See `surgery.contradiction`."""
        shapes = {"weight": (self.out_features, self.in_features), "scale": (self.out_features,), "bias": (self.out_features,)}
        return surgery.mismatch(self, shapes, {"weight": torch.int8, "scale": torch.float32})

    @staticmethod
    def _dtype_name(tensor: torch.Tensor | None) -> str | None:
        return None if tensor is None else str(tensor.dtype).removeprefix("torch.")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        buffers = self._buffers
        return kernels.linear(x, buffers["weight"], buffers["scale"], buffers["bias"])

    def _apply(self, fn, recurse=True):
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
