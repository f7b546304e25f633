"""Layers that store int8 and compute in float, and transposed convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import in_int8, randn
from torch import Tensor, nn
from torch.nn import functional as F

import quantize
from quantize.compression.int8 import speed, whole
from quantize.nn import int8_kernels as kernels
from quantize.nn.int8_conv import Int8Conv
from quantize.nn.int8_transposed import Int8ConvTranspose
from quantize.nn.timing import Timing


def seeded(make: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


@torch.no_grad()
def test_a_layer_that_stores_int8_and_computes_in_float():
    """It is torch's convolution of the weight that it reads as, also after the weight changes."""
    plain = seeded(lambda: nn.Conv2d(33, 40, 3, 2, 1))
    new, x = Int8Conv.from_layer(plain, floats=True, relu=True), randn(2, 33, 9, 7)
    for _ in range(2):
        expected = F.conv2d(x, new.dense_weight(), new.bias, 2, 1).relu()
        assert torch.allclose(new(x), expected, atol=1e-6)
        new.scale.mul_(2)
    assert new.packed.dtype == torch.int8 and new(x.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_convolutions_that_int8_makes_slower_are_stored_in_it(tmp_path, monkeypatch):
    """With the two times in the summary, within the error of the weights, through a file."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(33, 40, 3), nn.BatchNorm2d(40), nn.ReLU6(), nn.Flatten())

    def slow(plain: nn.Module, make_small: Any, x: Tensor, *, kind: Any = None) -> Timing:
        return Timing(tuple(x.shape), 1e-6, 2e-6)

    monkeypatch.setattr(speed, "time_layers", slow)
    monkeypatch.setattr(whole, "slower_as_a_whole", lambda *_: None)
    plain, x = seeded(make), randn(2, 33, 9, 9)
    small = quantize.quantize_dynamic(plain)
    done = quantize.summary(small).done
    assert "computes in float: int8 is slower here: 2.0 us against 1.0" in done["0"]
    assert done["2"] == "folded into 0" and isinstance(small[0], Int8Conv) and small[0].floats
    assert (small(x) - plain(x)).norm() <= 0.006 * plain(x).norm()
    quantize.save(small, tmp_path / "model.pth")
    assert torch.equal(quantize.load(tmp_path / "model.pth", model=make())(x), small(x))


@torch.no_grad()
def test_the_largest_output_of_relu6():
    """nn.ReLU6 behind a convolution is folded into it."""
    plain = seeded(lambda: nn.Sequential(nn.Conv2d(33, 40, 3), nn.ReLU6()))
    small, x = in_int8(plain), 9 * randn(2, 33, 9, 9)
    assert quantize.summary(small).done["1"] == "folded into 0"
    assert small(x).min() == 0 and small(x).max() == 6
    unlimited = Int8Conv(small[0].packed, small[0].scale, small[0].bias, **settings(small[0]))
    assert torch.equal(small(x), unlimited(x).clamp(0, 6))


def settings(conv: Int8Conv) -> dict[str, Any]:
    return {name: getattr(conv, name) for name in ("stride", "padding", "dilation")}


TRANSPOSED: dict[str, Any] = {
    "line": lambda: nn.ConvTranspose1d(33, 40, 3, 3),
    "image": lambda: nn.ConvTranspose2d(33, 40, (2, 3), (2, 3), bias=False),
    "volume": lambda: nn.ConvTranspose3d(33, 5, 2, 2),
}


@pytest.mark.parametrize("name", TRANSPOSED)
@torch.no_grad()
def test_a_transposed_convolution(name: str, tmp_path):
    """Close to the float layer, in its shape; the same bits without native code and from a file."""
    plain = seeded(TRANSPOSED[name])
    new, x = Int8ConvTranspose.from_layer(plain), randn(2, 33, *(5, 4, 3)[: len(plain.stride)])
    expected, actual = plain(x), new(x)
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= 0.02 * expected.norm()
    assert (new.weight - plain.weight).norm() <= 0.01 * plain.weight.norm()
    assert torch.equal(new(x[0]), actual[0])
    with kernels.kernel("reference"):
        assert torch.equal(new(x), actual)
    model = in_int8(nn.Sequential(plain, nn.Flatten()))
    quantize.save(model, tmp_path / "model.pth")
    fresh = nn.Sequential(seeded(TRANSPOSED[name]), nn.Flatten())
    assert torch.equal(quantize.load(tmp_path / "model.pth", model=fresh)(x), actual.flatten(1))


OVERLAPPING: dict[str, Any] = {
    "line": lambda: nn.ConvTranspose1d(33, 40, 4, 2, 1),
    "groups": lambda: nn.ConvTranspose2d(33, 39, 3, 2, 1, 1, groups=3, bias=False),
    "dilation": lambda: nn.ConvTranspose2d(33, 40, 2, 2, dilation=2),
}


@pytest.mark.parametrize("name", OVERLAPPING)
@torch.no_grad()
def test_a_transposed_convolution_whose_windows_overlap(name: str, tmp_path):
    """It is stored in int8 and computes in float: torch's own of the weight that it reads as."""
    plain = seeded(OVERLAPPING[name])
    small = in_int8(nn.Sequential(plain, nn.Flatten(0)))
    new, x = small[0], randn(2, 33, *(5, 4)[: len(plain.stride)])
    done = quantize.summary(small).done
    assert "computes in float: a transposed convolution whose windows overlap" in done["0"]
    assert (new.weight - plain.weight).norm() <= 0.01 * plain.weight.norm()
    plain.weight.copy_(new.weight)
    assert torch.allclose(new(x), plain(x), atol=1e-5)
    if any(plain.output_padding):
        size = [n + 1 for n in plain(x, output_size=None).shape[2:]]
        with pytest.raises(ValueError, match="output_size must be"):
            new(x, output_size=size)
    quantize.save(small, tmp_path / "model.pth")
    fresh = nn.Sequential(seeded(OVERLAPPING[name]), nn.Flatten(0))
    assert torch.equal(quantize.load(tmp_path / "model.pth", model=fresh)(x), small(x))


def test_refusals():
    new = Int8ConvTranspose.from_layer(nn.ConvTranspose2d(32, 4, 2, 2))
    with pytest.raises(ValueError, match=r"must be \[N, 32, ...\]"):
        new(randn(2, 31, 4, 4))
    with pytest.raises(ValueError, match=r"output_size must be \[8, 8\]"):
        new(randn(2, 32, 4, 4), output_size=[9, 8])
    with pytest.raises(ValueError, match="computes in float"):
        Int8ConvTranspose.from_layer(nn.ConvTranspose2d(32, 4, 3, 2))
