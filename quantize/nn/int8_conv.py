"""Int8Conv: a convolution that stores int8 and computes in int8."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function

from quantize import surgery
from quantize.native.conv import Convolution, Ending, Geometry
from quantize.nn import dtype_name, dtype_named, int8_images
from quantize.nn import int8_kernels as kernels
from quantize.nn.elementary import check_activation
from quantize.nn.protocol import Int8Layer, copied, dtype_of, empty, empty_bias
from quantize.nn.tape import is_replacing

_MOST = 1 << 31  # sizes from a file are below


class Int8Convolution(Int8Layer):
    """What Int8Conv and Int8ConvTranspose have in common.

    settings: names of the attributes that say how a window moves, as in the float layer.
    """

    settings: tuple[str, ...]
    bias: Tensor | None
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]

    def note(self, bias: Tensor | None, settings: dict[str, Any]) -> None:
        """Record how `rebuild` makes this layer. bias: of the float one."""
        sizes = {"in_channels": self.in_channels, "out_channels": self.out_channels}
        known = {**sizes, "kernel_size": self.kernel_size, **settings}
        listed = {k: list(v) if isinstance(v, tuple) else v for k, v in known.items()}
        dtypes = {"bias": dtype_of(bias), "dtype": dtype_name(self.like.dtype)}
        surgery.record(self, type(self).__name__, **listed, **dtypes)

    def batched(self, x: Tensor) -> Tensor:
        """x, or a batch of it where it is one sample."""
        dims = len(self.kernel_size)
        if x.dim() not in (dims + 1, dims + 2) or x.shape[-dims - 1] != self.in_channels:
            raise ValueError(
                f"the input must be [N, {self.in_channels}, ...] with {dims} dimensions of size, "
                f"got {list(x.shape)}"
            )
        return x if x.dim() == dims + 2 else x.unsqueeze(0)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}"]
        parts += [f"{name}={getattr(self, name)}" for name in ("kernel_size", *self.settings)]
        return ", ".join(parts)


@surgery.builder
class Int8Conv(Int8Convolution):
    """A convolution of 1 to 3 dimensions with int8 weights, for inference: x `[N, C, *size]` (or
    one sample without N) of any float dtype, y the same.

    The state is plain tensors: `packed` int8 `[out, C / groups, *kernel]`, `scale` float32 `[out]`,
    `bias` `[out]` or None. `weight` reads as `packed * scale`. Each sample of x is quantized as a
    whole when it arrives; a depthwise layer stores int8 and computes in float32 (see
    `int8_images`), and so does one with `floats`, in torch's own convolution. relu: negative
    outputs become 0; ceiling: what larger outputs become; `activation` names another activation of
    the outputs, one of `elementary.ACTIVATIONS`. Gradients
    pass as through the float layer (see `straight`).

    Source: `torch.nn.Conv2d`.
    """

    settings = ("stride", "padding", "dilation", "groups", "padding_mode")

    def __init__(
        self,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        *,
        stride: tuple[int, ...],
        padding: str | tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int = 1,
        padding_mode: str = "zeros",
        relu: bool = False,
        ceiling: float | None = None,
        floats: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(dtype, packed=packed, scale=scale, bias=bias)
        self.out_channels, per_group, *kernel = packed.shape
        self.in_channels, self.groups = per_group * groups, groups
        self.kernel_size, self.stride, self.dilation = tuple(kernel), stride, dilation
        self.padding, self.padding_mode = padding, padding_mode
        self.relu, self.ceiling, self.floats = relu, ceiling, floats
        self.activation: str | None = None
        before, after = _pads(self.kernel_size, padding, dilation)
        self._pads = int8_images.pads_of(Geometry(stride, dilation, before, after))
        if padding_mode != "zeros":
            before = after = (0,) * len(kernel)
        self.geometry = Geometry(stride, dilation, before, after, groups)

    @classmethod
    def from_layer(cls, layer: Any, *, relu: bool = False, floats: bool = False) -> Int8Conv:
        """Quantize a float convolution; the bias is kept as it is.

        Args:
            layer: of 1 to 3 dimensions.
            relu: negative outputs become 0.
            floats: store int8, but compute in float.
        """
        weight, bias = layer.weight, layer.bias
        packed, scale = kernels.quantize_weight(weight.flatten(1))
        packed = packed.reshape(weight.shape)
        settings: dict[str, Any] = {name: getattr(layer, name) for name in cls.settings}
        settings |= {"relu": relu, "floats": floats}
        new = cls(packed, scale, copied(bias), dtype=weight.dtype, **settings)
        new.note(bias, settings)
        return new

    @classmethod
    def rebuild(
        cls,
        module: nn.Module,
        in_channels: int,
        out_channels: int,
        kernel_size: list[int],
        stride: list[int],
        padding: str | list[int],
        dilation: list[int],
        groups: int,
        padding_mode: str,
        relu: bool,
        bias: str | None,
        dtype: str = "float32",
        ceiling: float | None = None,
        floats: bool = False,
        activation: str | None = None,
    ) -> Int8Conv:
        """An empty layer (on the meta device) in place of `module`, for a file's tensors."""
        named = padding in ("same", "valid")
        pads: Any = [0] * len(kernel_size) if named else padding
        channels = in_channels, out_channels, groups
        check_sizes(channels, kernel_size, (stride, dilation), [pads])
        if padding_mode not in ("zeros", "reflect", "replicate", "circular"):
            raise ValueError(f"padding_mode={padding_mode!r} is none that torch knows")
        if ceiling is not None and not (type(ceiling) is float and ceiling > 0):
            raise ValueError(f"ceiling={ceiling!r} is no number above 0")
        check_activation(activation)
        new = cls(
            empty(torch.int8, out_channels, in_channels // groups, *kernel_size),
            empty(torch.float32, out_channels),
            empty_bias(bias, out_channels),
            stride=tuple(stride),
            padding=padding if isinstance(padding, str) else tuple(padding),
            dilation=tuple(dilation),
            groups=groups,
            padding_mode=padding_mode,
            relu=bool(relu),
            ceiling=ceiling,
            floats=bool(floats),
            dtype=dtype_named(dtype),
        )
        new.activation = activation
        return new.train(module.training)

    def activate(self, activation: str) -> None:
        """Give an activation of the result from here on, one of `elementary.ACTIVATIONS`."""
        self.activation = activation
        surgery.amend(self, "Int8Conv", activation=activation)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        outputs = (self.out_channels,)
        packed = (*outputs, self.in_channels // self.groups, *self.kernel_size)
        return {"packed": packed, "scale": outputs, "bias": outputs}

    def forward(self, input: Tensor) -> Tensor:
        buffers: Any = self._buffers  # read without nn.Module's __getattr__: it costs a microsecond
        held = input, buffers["packed"], buffers["scale"], buffers["bias"]
        if torch._C._len_torch_function_stack() and is_replacing():
            return handle_torch_function(self.convolved, (input,), *held)  # type: ignore[no-any-return]
        return self.convolved(*held)

    def convolved(self, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """What the forward gives for x and the tensors of this layer."""
        batch = self.batched(x)
        if self.padding_mode != "zeros":
            batch = F.pad(batch, self._pads, mode=self.padding_mode)
        compute = int8_images.in_float if self.floats else int8_images.convolve
        y = compute(batch, Convolution(packed, scale, bias, self.geometry, self.ending))
        return y if y.dim() == x.dim() else y.squeeze(0)

    @property
    def ending(self) -> Ending:
        """What becomes of its results."""
        low = 0.0 if self.relu else -math.inf
        return Ending(low, math.inf if self.ceiling is None else self.ceiling, self.activation)


def by_pixel(
    weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str | None
) -> Int8Conv:
    """An int8 linear layer as a convolution of images of one pixel, on the same memory. weight:
    [out, in].
    """
    still: dict[str, Any] = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    made = Int8Conv(weight[..., None, None], scale, bias, **still)
    made.activation = activation
    return made


def _pads(
    kernel: tuple[int, ...], padding: str | tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What is added before and after each dimension."""
    if padding == "valid":
        return (0,) * len(kernel), (0,) * len(kernel)
    if isinstance(padding, tuple):
        return padding, padding
    whole = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]  # "same"
    return tuple(n // 2 for n in whole), tuple(n - n // 2 for n in whole)


def check_sizes(
    channels: Sequence[int],
    kernel: Sequence[int],
    moves: Sequence[Sequence[int]],
    pads: Sequence[Sequence[int]],
) -> None:
    """Raise ValueError for numbers from a file that make no convolution.

    Args:
        channels: in, out, and groups of them.
        kernel: its sizes.
        moves: strides and dilations. pads: what is added to each dimension.
    """
    *sizes, groups = channels
    counts = [*channels, *kernel, *chain.from_iterable(moves)]
    whole = all(type(n) is int and 0 < n < _MOST for n in counts)
    whole = whole and all(type(n) is int and 0 <= n < _MOST for n in chain.from_iterable(pads))
    even = all(len(one) == len(kernel) for one in (*moves, *pads)) and 1 <= len(kernel) <= 3
    if not whole or not even or any(size % groups for size in sizes):
        raise ValueError(f"{counts} and padding {pads} make no convolution")
