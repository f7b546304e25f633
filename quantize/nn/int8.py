"""Int8Linear: a linear layer that stores int8 and computes in int8."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from quantize import surgery
from quantize.nn import Operands, dtype_name, dtype_named, is_transposed
from quantize.nn import int8_kernels as kernels
from quantize.nn.elementary import check_activation
from quantize.nn.protocol import Int8Layer, copied, dtype_of, empty, empty_bias


@surgery.builder
class Int8Linear(Int8Layer):
    """`y = x W^T + b` with W in int8, for inference: x `[..., in_features]` of any float dtype, y
    the same.

    The state is plain tensors: `packed` int8 `[out, in]`, `scale` float32 `[out]` (which stays
    float32 under `.half()`), `bias` `[out]` or None. `weight` reads as `packed * scale`, in the
    dtype of the layer that was quantized. Each row of x is quantized when it arrives (see
    `kernels`). y is an activation of that where `activation` names one of
    `elementary.ACTIVATIONS`. Gradients pass as through the float layer
    (see `straight`).
    """

    bias: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        **more: Tensor,
    ) -> None:
        super().__init__(dtype, None, packed=packed, scale=scale, bias=bias, **more)
        self.out_features, self.in_features = packed.shape
        self.activation: str | None = None

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None) -> Int8Linear:
        """Quantize a float weight `[out, in]`; the bias is kept as it is."""
        new = cls(*kernels.quantize_weight(weight), copied(bias), dtype=weight.dtype)
        new.note()
        return new

    def note(self, **more: Any) -> None:
        """Record how `rebuild` makes this layer; more: arguments of its own kind."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        dtypes = {"bias": dtype_of(self.bias), "dtype": dtype_name(self.like.dtype)}
        surgery.record(self, type(self).__name__, **sizes, **dtypes, **more)

    @classmethod
    def rebuild(
        cls,
        module: nn.Module,
        in_features: int,
        out_features: int,
        bias: str | None,
        dtype: str = "float32",
        activation: str | None = None,
    ) -> Int8Linear:
        """An empty layer (on the meta device) in place of `module`, for a file's tensors."""
        new = cls(*empties(in_features, out_features, bias), dtype=dtype_named(dtype))
        return new.in_place_of(module, activation)

    def in_place_of(self, module: nn.Module, activation: str | None) -> Self:
        """This layer, with what it has of the module that it replaces.

        Raises: ValueError: an activation that there isn't.
        """
        check_activation(activation)
        self.activation = activation
        self.transposed = is_transposed(module)
        return self.train(module.training)

    def activate(self, activation: str) -> None:
        """Give an activation of the result from here on, one of `elementary.ACTIVATIONS`."""
        self.activation = activation
        surgery.amend(self, type(self).__name__, activation=activation)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        outputs = (self.out_features,)
        return {"packed": (*outputs, self.in_features), "scale": outputs, "bias": outputs}

    def forward(self, input: Tensor) -> Tensor:
        buffers: Any = self._buffers  # read without nn.Module's __getattr__: it costs a microsecond
        weight, scale, bias = buffers["packed"], buffers["scale"], buffers["bias"]
        return kernels.linear(input, weight, scale, bias, None, self.activation)

    def operands(self) -> Operands | None:
        """None where an activation follows the product."""
        if self.activation is not None:
            return None
        return Operands(self.packed, self.bias, self.scale)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activation={self.activation}"
        )


def empties(
    in_features: int, out_features: int, bias: str | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Places for `packed`, `scale` and `bias` (of that dtype, if any)."""
    packed = empty(torch.int8, out_features, in_features)
    return packed, empty(torch.float32, out_features), empty_bias(bias, out_features)
