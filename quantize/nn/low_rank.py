"""A linear or convolution as a pair of smaller ones: two ordinary layers, so that every other
technique works inside.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from quantize import check, surgery
from quantize.nn import CompressedLayer, dense_weight, is_transposed


def _empty(
    kind: type[nn.Module], *sizes: int, device: Any, dtype: torch.dtype | None, **options: Any
) -> Any:
    """A layer whose numbers are still to be filled in.

    As `nn.utils.skip_init`, but without its `empty_like` of a meta tensor, which under
    `torch.device("meta")` (in which files are loaded) imports a symbolic algebra package for two
    seconds.
    """
    layer = kind(*sizes, device="meta", dtype=dtype, **options)
    for name, parameter in layer._parameters.items():
        if parameter is not None:
            layer._parameters[name] = nn.Parameter(
                torch.empty(parameter.shape, device=device or "cpu", dtype=parameter.dtype)
            )
    return layer


class _Pair(CompressedLayer):
    first: Any  # a linear layer or convolution, whatever a later technique put in its place
    second: Any

    def contradiction(self) -> str | None:
        """See `surgery.contradiction`."""
        kind = "features" if isinstance(self, LowRankLinear) else "channels"
        enters, leaves = f"in_{kind}", f"out_{kind}"
        same_input = getattr(self.first, enters) == getattr(self, enters)
        same_output = getattr(self.second, leaves) == getattr(self, leaves)
        if not same_input or not same_output:
            return f"its {enters} or {leaves} differ from those of its two layers"
        if getattr(self.first, leaves) != getattr(self.second, enters):
            return "its second layer doesn't take what the first one gives"
        return None

    @property
    def rank(self) -> int:
        """Width between the two layers."""
        entry = "in_features" if isinstance(self, LowRankLinear) else "in_channels"
        return int(getattr(self.second, entry))

    @property
    def trainable(self) -> bool:
        """Do gradients flow into both layers?"""
        return all(part.weight.requires_grad for part in (self.first, self.second))

    def weight_kind(self) -> tuple[torch.dtype, torch.device]:
        return self.second.weight.dtype, self.second.weight.device

    @property
    def bias(self) -> Tensor | None:
        return self.second.bias

    def forward(self, input: Tensor) -> Tensor:
        return self.second(self.first(input))


@surgery.builder
class LowRankLinear(_Pair):
    """x [..., in_features] -> [..., out_features] through `rank` numbers: y = second(first(x)).

    first: nn.Linear(in_features, rank, bias=False); second: nn.Linear(rank, out_features, bias).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"rank {rank} is outside [1, {min(in_features, out_features)}] for "
                f"{in_features} -> {out_features}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.first = _empty(nn.Linear, in_features, rank, bias=False, device=device, dtype=dtype)
        self.second = _empty(nn.Linear, rank, out_features, bias=bias, device=device, dtype=dtype)

    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def dense_weight(self) -> Tensor:
        """second @ first, float32 [out_features, in_features]."""
        return dense_weight(self.second) @ dense_weight(self.first)

    @classmethod
    def rebuild(
        cls, module: Any, *, in_features: int, out_features: int, rank: int, bias: bool
    ) -> LowRankLinear:
        """An empty layer in the place of `module` (a linear of that shape), on its device and of
        its dtype.
        """
        if linear_shape(module) != (out_features, in_features):
            raise ValueError(f"expected a linear {in_features} -> {out_features}, found {module}")
        like = {"device": module.weight.device, "dtype": module.weight.dtype}
        return _heir(module, cls(in_features, out_features, rank, bias, **like))


class _LowRankConv(_Pair):
    """A convolution of one group through `rank` channels: [B, C, ...] -> [B, M, ...].

    split "channel": a convolution like the original but to `rank` channels, then one of kernel 1
    (Zhang et al., arXiv 1505.06798). split "spatial", in 2-D: kh x 1, then 1 x kw (Jaderberg et
    al., arXiv 1405.3866).
    """

    kind: type[nn.Module]
    splits: tuple[str, ...] = ("channel",)

    def __init__(self, like: Any, rank: int, split: str, bias: bool):
        super().__init__()
        check.one_of("split", split, self.splits)
        self.in_channels, self.out_channels = like.in_channels, like.out_channels
        self.kernel_size, self.stride, self.padding = like.kernel_size, like.stride, like.padding
        self.dilation, self.groups = like.dilation, like.groups
        self.padding_mode, self.split = like.padding_mode, split
        shape = {name: getattr(like, name) for name in _NEUTRAL}
        first, second = shape, _NEUTRAL
        if split == "spatial":
            first = {n: v if isinstance(v, str) else (v[0], _NEUTRAL[n]) for n, v in shape.items()}
            second = {n: v if isinstance(v, str) else (_NEUTRAL[n], v[1]) for n, v in shape.items()}
        common = {"device": like.weight.device, "dtype": like.weight.dtype}
        mode = like.padding_mode
        self.first = _empty(
            self.kind, like.in_channels, rank, **first, padding_mode=mode, bias=False, **common
        )
        mode = mode if split == "spatial" else "zeros"
        self.second = _empty(
            self.kind, rank, like.out_channels, **second, padding_mode=mode, bias=bias, **common
        )

    def weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels, *self.kernel_size

    def dense_weight(self) -> Tensor:
        """The kernel of the one convolution that does the same, [M, C, ...]."""
        second, first = dense_weight(self.second), dense_weight(self.first)
        if self.split == "channel":
            return (second.flatten(1) @ first.flatten(1)).reshape(self.weight_shape())
        return torch.einsum("mrab,rcde->mcadbe", second, first).reshape(self.weight_shape())

    @classmethod
    def rebuild(
        cls,
        module: nn.Module,
        *,
        in_channels: int,
        out_channels: int,
        rank: int,
        bias: bool,
        split: str,
    ) -> Self:
        """An empty layer in the place of `module` (a convolution of that shape), on its device and
        of its dtype.
        """
        found = getattr(module, "in_channels", None), getattr(module, "out_channels", None)
        if not isinstance(module, cls.kind) or found != (in_channels, out_channels):
            kind = cls.kind.__name__
            raise ValueError(f"expected a {kind} {in_channels} -> {out_channels}, found {module}")
        return _heir(module, cls(module, rank, split, bias))


@surgery.builder
class LowRankConv1d(_LowRankConv):
    """An `nn.Conv1d` as a pair of them: [B, C, L] -> [B, M, L']."""

    kind = nn.Conv1d


@surgery.builder
class LowRankConv2d(_LowRankConv):
    """An `nn.Conv2d` as a pair of them: [B, C, H, W] -> [B, M, H', W']."""

    kind = nn.Conv2d
    splits = ("channel", "spatial")


_NEUTRAL = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
Pair = LowRankLinear | LowRankConv1d | LowRankConv2d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)  # that can be pairs


def linear_shape(module: Any) -> tuple[int, int] | None:
    """(out, in) of a linear layer: nn.Linear, or GPT-2's Conv1D, which holds its weight transposed;
    None for others.
    """
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if is_transposed(module):
        return module.weight.shape[1], module.weight.shape[0]
    return None


def _heir(old: Any, new: Any) -> Any:
    """`new` with what stays of `old` when it takes its place: mode, requires_grad, hooks."""
    surgery.take_place(old, new)
    new.transposed = is_transposed(old)
    for parameter in new.parameters():
        parameter.requires_grad_(old.weight.requires_grad)
    return new


def matrix(module: Any) -> Tensor:
    """The weight of a linear or convolution as the matrix that multiplies its `calibration.rows`,
    [M, K].
    """
    weight = module.weight.detach()
    return weight.T if is_transposed(module) else weight.flatten(1)


@torch.no_grad()
def pair(
    module: nn.Module, first: Tensor, second: Tensor, bias: Tensor | None, *, split: str = "channel"
) -> Pair:
    """The factorized layer in the place of `module`: first [r, K'], second [M, K''], bias [M] or
    None, recorded.
    """
    arguments: dict[str, Any] = {"rank": first.shape[0], "bias": bias is not None}
    if isinstance(module, CONVOLUTIONS):
        sizes = {"in_channels": module.in_channels, "out_channels": module.out_channels}
        arguments |= {**sizes, "split": split}
        kind = LowRankConv1d if isinstance(module, nn.Conv1d) else LowRankConv2d
        new: Pair = kind.rebuild(module, **arguments)
    else:
        out_features, in_features = linear_shape(module) or (0, 0)
        arguments |= {"in_features": in_features, "out_features": out_features}
        new = LowRankLinear.rebuild(module, **arguments)
    new.first.weight.copy_(first.reshape(new.first.weight.shape))
    new.second.weight.copy_(second.reshape(new.second.weight.shape))
    if bias is not None:
        new.second.bias.copy_(bias)
    surgery.record(new, type(new).__name__, **arguments)
    return new
