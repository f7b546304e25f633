"""The means of outputs that int8 misses, which biases bring back."""

from __future__ import annotations

import pytest
import torch
from helpers import in_int8, randn, seeded
from torch import Tensor, nn

import quantize

KINDS = {
    "linear": (lambda: nn.Linear(24, 10), (24,)),
    "linear of steps": (lambda: nn.Linear(24, 10), (7, 24)),
    "1d": (lambda: nn.Conv1d(24, 10, 3), (24, 9)),
    "2d": (lambda: nn.Conv2d(12, 10, 3, padding=1), (12, 6, 6)),
    "grouped": (lambda: nn.Conv2d(24, 12, 3, groups=2), (24, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(24, 24, 3, groups=24), (24, 6, 6)),
}


def loud(samples: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Inputs of channels whose means are far from 0."""
    channels = max(range(len(shape)), key=lambda i: (shape[i] in (12, 24), -i))
    means = 20 * randn(shape[channels], seed=9).abs()
    sizes = [1] * len(shape)
    sizes[channels] = -1
    return randn(samples, *shape, seed=seed) + means.reshape(sizes)


def steps_of(model: nn.Module) -> dict:
    return quantize.summary(model).steps[-1].settings


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_means_come_back(kind: str):
    """On inputs like those of calibration too."""
    build, shape = KINDS[kind]
    model = nn.Sequential(seeded(build)).eval()
    batches = [loud(8, shape, seed) for seed in range(4)]
    plain, shifted = in_int8(model), in_int8(model, calibration=batches)
    assert steps_of(shifted)["shifted"] == ["0"]

    def missed(new: nn.Module, x: Tensor) -> Tensor:
        error = new(x) - model(x)
        return error.movedim(-1 if kind.startswith("linear") else 1, -1).flatten(0, -2).mean(0)

    for seed, share in ((2, 0.35), (7, 0.5)):
        x = loud(32, shape, seed)
        assert missed(shifted, x).norm() < share * missed(plain, x).norm()


@torch.no_grad()
def test_samples_that_disagree_shift_nothing():
    """The mean of a few errors that differ by chance is no shift."""
    model = nn.Sequential(seeded(lambda: nn.Linear(64, 400))).eval()
    one, other = randn(1, 64, seed=1), randn(1, 64, seed=2)
    plain = in_int8(model)
    errors = torch.cat([model(x) - plain(x) for x in (one, other)]).double()
    new = in_int8(model, calibration=[one, other])
    shift = (new[0].bias - model[0].bias).double()
    unlike = errors[0].sign() != errors[1].sign()
    assert unlike.any()
    assert (shift[unlike].abs() < 1e-7).all()
    assert (shift.abs() <= errors.mean(0).abs() + 1e-7).all()


def test_one_sample_shifts_nothing():
    model = nn.Sequential(seeded(lambda: nn.Linear(24, 10))).eval()
    new = in_int8(model, calibration=[loud(1, (24,))])
    assert "shifted" not in steps_of(new)
    assert torch.equal(new[0].bias, model[0].bias)


@torch.no_grad()
def test_layers_in_float_keep_their_bias():
    """A layer that `max_error` puts back into float, and those that have none."""

    def build() -> nn.Module:
        layers = nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 48, bias=False), nn.Linear(48, 6)
        return nn.Sequential(*layers)

    model = seeded(build)
    batches = [loud(8, (24,), seed) for seed in range(4)]
    whole = in_int8(model, calibration=batches)
    assert steps_of(whole)["shifted"] == ["0", "3"]
    assert whole[2].bias is None
    costs = quantize.summary(whole).steps[-1].distance
    part = in_int8(model, calibration=batches, max_error=0.9 * costs)
    kept = [name for name in ("0", "3") if type(part.get_submodule(name)) is nn.Linear]
    for name in kept:
        assert torch.equal(part.get_submodule(name).bias, model.get_submodule(name).bias)
    floats = [name for name in ("0", "2", "3") if type(part.get_submodule(name)) is nn.Linear]
    assert floats
