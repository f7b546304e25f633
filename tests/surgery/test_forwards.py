"""Subclasses of layers of torch: which of them compute what these compute."""

from __future__ import annotations

import torch
from helpers import in_int8, randn
from torch import Tensor, nn
from torch.nn import functional as F

import quantize
from quantize.nn.int8 import Int8Linear
from quantize.nn.int8_conv import Int8Conv


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Renamed(nn.Linear):
    pass


class Written(nn.Linear):
    """As timm writes it."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.linear(x, self.weight.to(dtype=x.dtype), bias=self.bias)
        return F.linear(x, self.weight, bias=self.bias)


class Asks(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if x.sum() > 0 else 1)


class Unbiased(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Called(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class Adapted(nn.Linear):
    """An adapter, merged by now, that can be taken out of the weight again."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.merged = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.merged else super().forward(x) + x


class Counted(nn.Linear):
    """Has a count in its buffers, which can be saved."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)  # type: ignore[operator]  # it is a tensor
        return super().forward(x)


class Keeps(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return super().forward(x)


class Renews(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight = nn.Parameter(self.weight.detach())
        return super().forward(x)


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x) if self.training else x)


class Standardized(nn.Conv1d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean((1, 2), True), bias)


class Passed(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_subclasses_with_their_own_forward_are_left_alone():
    """Only layers that compute what torch's do in every call are replaced, however they are
    written; the others are as they were.
    """
    convolutions = Standardized(12, 12, 3, padding=1), Passed(12, 12, 3, padding=1)
    own = Scaled, Asks, Unbiased, Called, Adapted, Counted, Keeps, Renews, Noisy
    linears = (kind(4, 4) for kind in (*own, Renamed, Written))
    plain = nn.Sequential(*convolutions, *linears).eval()
    small, x = in_int8(plain), randn(3, 12, 4)
    assert [*map(type, small)] == [Standardized, Int8Conv, *own, Int8Linear, Int8Linear]
    assert plain[7].calls == 0 and not hasattr(plain[8], "seen")
    left = quantize.summary(small).left
    assert left.keys() == {"0", *map(str, range(2, 11))}
    assert all("forward of its own" in why for why in left.values())
    with torch.no_grad():
        assert (small(x) - plain(x)).norm() <= 0.05 * plain(x).norm()
