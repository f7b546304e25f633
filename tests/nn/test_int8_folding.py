"""What is folded into int8 convolutions, in models that read more than one would think."""

from __future__ import annotations

import pytest
import torch
from helpers import in_int8, randn
from torch import Tensor, nn

import quantize
from quantize import calibration, surgery

FOLDABLE = ("first", "second")


class Net(nn.Module):
    """Two convolutions with BatchNorm behind them."""

    def __init__(self):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.second, self.norm2 = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """In eval mode, with running statistics of real activations."""
    model.train()
    for _ in range(4):
        model(3 + 2 * x)
    return model.eval()


def observed(model: nn.Module, x: Tensor) -> dict[str, str]:
    layers = {name: model.get_submodule(name) for name in FOLDABLE}
    return calibration.followers(model, [x], layers)


def assert_stays_near(model: nn.Module, x: Tensor) -> None:
    """Its int8 twins, calibrated or not, answer as it does."""
    with torch.no_grad():
        expected = model(x)
        for given in (None, [x]):
            small = in_int8(model, calibration=given)
            assert (small(x) - expected).norm() <= 0.03 * expected.norm()


class SharesReLU(nn.Module):
    """A residual block as in torchvision: one ReLU, in place, behind a norm and behind the sum."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


def test_an_activation_that_runs_twice_stays():
    """A convolution does the work of one call of a ReLU, and of no other."""
    x = randn(2, 16, 8, 8)
    model = trained(SharesReLU(), x)
    assert_stays_near(model, x)
    small = in_int8(model, calibration=[x])
    assert isinstance(small.relu, nn.ReLU) and "bn1" in quantize.summary(small).done


class TiedDecoder(Net):
    """Its decoder multiplies by the weight of the first convolution, and reads the dtype of the
    second one's.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.first(x)).to(self.second.weight.dtype)
        x = self.norm2(self.second(x))
        return nn.functional.conv_transpose2d(x, self.first.weight, padding=1)


def test_a_weight_that_others_read():
    """Whoever computes with a convolution's weight needs it without the norm behind it."""
    x = randn(2, 3, 8, 8)
    model = trained(TiedDecoder(), x)
    assert observed(model, x) == {"second": "norm2"}
    assert "first" not in surgery.traced_followers(model, FOLDABLE)
    assert_stays_near(model, x)


class MayReturnEarly(Net):
    """Without `aux` it gives what lies between a convolution and its norm."""

    def forward(self, x: Tensor, aux: Tensor | None = None) -> Tensor:
        between = self.second(self.norm1(self.first(x)).relu())
        x = self.norm2(between)
        return between if aux is None else x + aux


def test_an_output_that_some_calls_read():
    """An optional argument decides who reads the output of a convolution."""
    x = randn(2, 3, 8, 8)
    model = trained(MayReturnEarly(), x)
    assert surgery.traced_followers(model, FOLDABLE) == {"first": "norm1"}
    assert_stays_near(model, x)


def test_a_large_error_is_said():
    """One channel that takes all steps of a sample: int8 loses the others, and says so."""
    x = randn(2, 8, 30) * torch.tensor([1000.0, *[1.0] * 7])[:, None]
    model = nn.Sequential(nn.Conv1d(8, 64, 5), nn.ReLU(), nn.Conv1d(64, 8, 5)).eval()
    with torch.no_grad():
        model[0].weight[:, 0] /= 1000
    with pytest.warns(UserWarning, match=r"moved by \d+% on calibration; max_error="):
        in_int8(model, calibration=[x])
