"""Norms that apply an activation themselves: folded as a BatchNorm and an activation are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import in_int8, randn, seeded
from torch import nn
from torch.nn import functional as F

import quantize
from quantize.nn.int8_conv import Int8Conv


class NormAct(nn.BatchNorm2d):
    """As timm writes it."""

    def __init__(self, channels: int, act: nn.Module, factor: float = 1.0) -> None:
        super().__init__(channels)
        self.drop, self.act, self.factor = nn.Identity(), act, factor
        self.calls = 0
        with torch.no_grad():
            self.running_mean.normal_()
            self.running_var.uniform_(0.5, 2)
            self.weight.normal_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._assert(x.ndim == 4, "expected a batch of images")
        mean, var = self.running_mean, self.running_var
        x = F.batch_norm(x, mean, var, self.weight, self.bias, self.training, eps=self.eps)
        self.calls += 1
        return self.factor * self.act(self.drop(x))


def network(factor: float = 1.0) -> nn.Module:
    norms = NormAct(40, nn.SiLU(), factor), NormAct(24, nn.Identity()), NormAct(24, nn.ReLU())
    convolutions = nn.Conv2d(8, 40, 3, bias=False), nn.Conv2d(40, 24, 1)
    pool = nn.MaxPool2d(2)
    return nn.Sequential(convolutions[0], norms[0], convolutions[1], *norms[1:], pool, nn.Flatten())


@pytest.mark.parametrize("calibrated", [False, True])
@torch.no_grad()
def test_norms_with_an_activation_are_folded(calibrated: bool, tmp_path):
    """With the error of int8 alone, and through a file; a norm that no convolution precedes stays
    what it was.
    """
    plain, x = seeded(network).eval(), randn(2, 8, 12, 12)
    given: dict[str, Any] = {"calibration": [x]} if calibrated else {}
    small: Any = in_int8(plain, **given)
    done = quantize.summary(small).done
    assert {n for n, what in done.items() if what == "folded into 0"} == {"1.0", "1.1"}
    assert done["3.0"] == "folded into 2" and type(small[4]) is NormAct
    assert isinstance(small[0], Int8Conv) and small[0].activation == "silu"
    assert (small(x) - plain(x)).norm() <= 0.02 * plain(x).norm()
    quantize.save(small, tmp_path / "model.pth")
    assert torch.equal(quantize.load(tmp_path / "model.pth", model=network().eval())(x), small(x))


@torch.no_grad()
def test_norms_that_do_more_stay():
    """Here a factor, which the layers inside don't tell of. Its forward's run leaves no trace."""
    plain, x = seeded(lambda: network(2.0)).eval(), randn(2, 8, 12, 12)
    small: Any = in_int8(plain)
    assert type(small[1]) is NormAct and small[1].calls == plain[1].calls == 0
    assert "1.0" not in quantize.summary(small).done
    assert (small(x) - plain(x)).norm() <= 0.02 * plain(x).norm()
