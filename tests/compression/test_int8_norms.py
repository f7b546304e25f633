"""Norms with a forward of their own: folded and pruned as a BatchNorm and an activation are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close, in_int8, randn, seeded
from torch import nn
from torch.nn import functional as F

import quantize
from quantize.nn.int8_conv import Int8Conv
from quantize.run.fusion import fold
from quantize.run.fusion.edit import calls
from quantize.run.fusion.export import capture
from quantize.run.fusion.passes import simplify


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


class Frozen(nn.Module):
    """As torchvision writes it, with an eps that no attribute tells."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias, mean, var = (buffer.reshape(1, -1, 1, 1) for buffer in self.buffers())
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


def frozen_network() -> nn.Module:
    convolutions = nn.Conv2d(8, 40, 3, bias=False), nn.Conv2d(40, 24, 3, padding=1)
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4)
    return nn.Sequential(
        convolutions[0], Frozen(40), nn.ReLU(), convolutions[1], Frozen(24), nn.ReLU(), *ends
    )


@torch.no_grad()
def test_frozen_norms_are_folded(tmp_path):
    """By int8, through a file, and by a fused graph."""
    plain, x = seeded(frozen_network).eval(), randn(2, 8, 12, 12)
    small: Any = in_int8(plain)
    done = quantize.summary(small).done
    assert {n for n, what in done.items() if what == "folded into 0"} == {"1.0", "2"}
    assert (small(x) - plain(x)).norm() <= 0.02 * plain(x).norm()
    quantize.save(small, tmp_path / "model.pth")
    again = quantize.load(tmp_path / "model.pth", model=frozen_network().eval())
    assert torch.equal(again(x), small(x))
    program = capture(plain, x)
    simplify(program)
    assert not calls(program, {torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor})
    assert_close(fold(plain, x)(x), plain(x))


class FrozenAnywhere(Frozen):
    """For inputs of all dimensions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias, mean, var = self.buffers()
        return F.batch_norm(x, mean, var, weight, bias)


@pytest.mark.parametrize(
    ("layers", "shape", "folds"),
    [
        ((nn.Conv1d(8, 24, 5), FrozenAnywhere(24), nn.ReLU()), (2, 8, 12), True),
        ((nn.Conv3d(8, 24, 3), FrozenAnywhere(24), nn.ReLU()), (2, 8, 4, 4, 4), True),
        ((nn.Linear(8, 24), FrozenAnywhere(24), nn.ReLU()), (2, 8), False),
        ((nn.Conv2d(8, 24, 3), Frozen(24), nn.ReLU()), (8, 12, 12), False),
    ],
    ids=["sequences", "volumes", "rows", "one image"],
)
@torch.no_grad()
def test_frozen_norms_of_other_inputs(layers: tuple[nn.Module, ...], shape, folds: bool):
    """Calibration tells what they read; those that are no BatchNorm there stay what they are."""
    plain, x = nn.Sequential(*layers).eval(), randn(*shape)
    small: Any = in_int8(plain, calibration=[x])
    assert (type(small[1]) is type(layers[1])) is not folds
    assert small(x).shape == plain(x).shape
    assert (small(x) - plain(x)).norm() <= 0.02 * plain(x).norm()


@torch.no_grad()
def test_channels_of_frozen_norms_are_pruned():
    """As those of a BatchNorm with the same numbers."""
    plain, twin = seeded(frozen_network).eval(), seeded(frozen_network).eval()
    for place in ("1", "4"):
        norm = nn.BatchNorm2d(len(twin.get_submodule(place).weight))
        norm.load_state_dict(twin.get_submodule(place).state_dict(), strict=False)
        setattr(twin, place, norm.eval())
    x = randn(2, 8, 12, 12)
    small, other = (quantize.prune_ln_structured(m, x, amount=0.4) for m in (plain, twin))
    assert type(small[1]) is Frozen and len(small[1].weight) == small[0].out_channels < 40
    assert_close(small(x), other(x))
