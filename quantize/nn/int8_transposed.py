"""Int8ConvTranspose: a transposed convolution that stores int8.

Where windows touch (the stride is the size of the kernel and nothing is padded), each input pixel
gives a block of output pixels that no other one reaches. So the layer is a convolution of one pixel
(`int8_images`) with outputs for every place of the kernel, and its results are put into their
places. Where windows overlap, the layer computes in float, in torch's own convolution.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function

from quantize import surgery
from quantize.native.conv import Convolution, Geometry
from quantize.nn import dtype_named, int8_images
from quantize.nn import int8_kernels as kernels
from quantize.nn.int8_conv import Int8Convolution, check_sizes
from quantize.nn.protocol import copied, empty, empty_bias
from quantize.nn.tape import is_replacing


def windows_touch(layer: Any) -> bool:
    """Does each output pixel of a transposed convolution belong to one input pixel?"""
    plain = not any((*layer.padding, *layer.output_padding)) and layer.groups == 1
    still = all(n == 1 for n in layer.dilation)
    return plain and still and tuple(layer.stride) == tuple(layer.kernel_size)


@surgery.builder
class Int8ConvTranspose(Int8Convolution):
    """A transposed convolution of 1 to 3 dimensions with int8 weights, for inference: x
    `[N, C, *size]` (or one sample without N) of any float dtype, y the same.

    The state is plain tensors, a row for each place of the kernel: `packed` int8
    `[out / groups * places, C, 1, ...]`, `scale` float32 `[out / groups * places]`, `bias` `[out]`
    or None, one for each row in a layer that computes in int8. `weight` reads as in the layer that
    was quantized. floats: it computes in float. Gradients pass as through the
    float layer (see `straight`).

    Source: `torch.nn.ConvTranspose2d`.
    """

    settings = ("stride", "padding", "output_padding", "dilation", "groups")

    def __init__(
        self,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        *,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        output_padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
        floats: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(dtype, packed=packed, scale=scale, bias=bias)
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.output_padding, self.dilation = output_padding, dilation
        self.groups, self.floats = groups, floats
        self.in_channels = packed.shape[1]
        self.out_channels = len(packed) // math.prod(kernel_size) * groups
        if not floats and not windows_touch(self):
            raise ValueError("a transposed convolution whose windows overlap computes in float")

    @classmethod
    def from_layer(cls, layer: Any, *, floats: bool = False) -> Int8ConvTranspose:
        """Quantize a float layer. floats: compute in float, as a layer must whose windows
        overlap.
        """
        weight, bias = layer.weight.detach(), layer.bias
        rows = weight.movedim(0, -1).reshape(-1, weight.shape[0])
        packed, scale = kernels.quantize_weight(rows)
        settings: dict[str, Any] = {name: getattr(layer, name) for name in cls.settings}
        settings |= {"kernel_size": layer.kernel_size, "floats": floats}
        own = copied(bias)
        if own is not None and not floats:
            own = own.repeat_interleave(math.prod(layer.kernel_size))
        packed = packed.reshape(*rows.shape, *[1] * len(layer.kernel_size))
        new = cls(packed, scale, own, dtype=weight.dtype, **settings)
        new.note(bias, settings)
        return new

    @classmethod
    def rebuild(
        cls,
        module: nn.Module,
        in_channels: int,
        out_channels: int,
        kernel_size: list[int],
        groups: int,
        floats: bool,
        bias: str | None,
        dtype: str,
        **sizes: list[int],
    ) -> Int8ConvTranspose:
        """An empty layer (on the meta device) in place of `module`, for a file's tensors."""
        moves, pads = ("stride", "dilation"), ("padding", "output_padding")
        given = [[sizes.get(name, []) for name in names] for names in (moves, pads)]
        check_sizes((in_channels, out_channels, groups), kernel_size, *given)
        rows = out_channels // groups * math.prod(kernel_size)
        new = cls(
            empty(torch.int8, rows, in_channels, *[1] * len(kernel_size)),
            empty(torch.float32, rows),
            empty_bias(bias, out_channels if floats else rows),
            kernel_size=tuple(kernel_size),
            groups=groups,
            floats=bool(floats),
            dtype=dtype_named(dtype),
            **{name: tuple(size) for name, size in sizes.items()},
        )
        return new.train(module.training)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        rows = self.out_channels // self.groups * math.prod(self.kernel_size)
        packed = rows, self.in_channels, *[1] * len(self.kernel_size)
        biases = self.out_channels if self.floats else rows
        return {"packed": packed, "scale": (rows,), "bias": (biases,)}

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        held = input, self.packed, self.scale, self.bias
        if torch._C._len_torch_function_stack() and is_replacing():
            return handle_torch_function(self.convolved, (input,), *held, output_size)  # type: ignore[no-any-return]
        return self.convolved(*held, output_size)

    def convolved(
        self,
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        output_size: list[int] | None,
    ) -> Tensor:
        """What the forward gives for x and the tensors of this layer."""
        batch = self.batched(x)
        more = self._output_padding(batch, output_size)
        if self.floats:
            y = self._in_float(batch, packed, scale, bias, more)
        else:
            y = self._in_int8(batch, packed, scale, bias)
        return y if y.dim() == x.dim() else y.squeeze(0)

    def _output_padding(self, x: Tensor, output_size: list[int] | None) -> tuple[int, ...]:
        """What is added behind each dimension so that the output has this size."""
        if output_size is None:
            return self.output_padding
        least = [
            (n - 1) * s - 2 * p + d * (k - 1) + 1
            for n, s, p, d, k in zip(
                x.shape[2:], self.stride, self.padding, self.dilation, self.kernel_size, strict=True
            )
        ]
        asked = list(output_size)[-len(least) :]
        more = tuple(a - n for a, n in zip(asked, least, strict=True))
        most = self.stride if self.floats else (1,) * len(least)
        if not all(0 <= m < s for m, s in zip(more, most, strict=True)):
            raise ValueError(f"output_size must be {least} for {list(x.shape)}, or little more")
        return more

    def _in_float(
        self,
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        output_padding: tuple[int, ...],
    ) -> Tensor:
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
        weight = int8_images.dense(packed, scale, self._unrolled)
        bias = None if bias is None else bias.float()
        moves = self.stride, self.padding, output_padding, self.groups, self.dilation
        y = function[len(self.stride) - 1](x.float(), weight, bias, *moves)
        return y.to(x.dtype)

    def _in_int8(self, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        dims = len(self.stride)
        ones, zeros = (1,) * dims, (0,) * dims
        geometry = Geometry(ones, ones, zeros, zeros)
        y = int8_images.convolve(x, Convolution(packed, scale, bias, geometry))
        blocks = y.reshape(y.shape[0], self.out_channels, *self.stride, *y.shape[2:])
        order: list[int] = []
        for axis in range(dims):
            order += [2 + dims + axis, 2 + axis]  # a size of x, and the places inside
        size = [n * s for n, s in zip(x.shape[2:], self.stride, strict=True)]
        return blocks.permute(0, 1, *order).reshape(y.shape[0], self.out_channels, *size)

    def _unrolled(self, rows: Tensor) -> Tensor:
        """Rows [out / groups * places, C, 1, ...] as [C, out / groups, *kernel]."""
        outputs = self.out_channels // self.groups
        blocks = rows.reshape(outputs, *self.kernel_size, self.in_channels)
        return blocks.movedim(-1, 0).contiguous()

    def dense_weight(self) -> Tensor:
        return self._unrolled(super().dense_weight())

    def weight_shape(self) -> tuple[int, ...]:
        return self.in_channels, self.out_channels // self.groups, *self.kernel_size
