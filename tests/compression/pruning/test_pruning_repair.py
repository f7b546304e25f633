"""Structured pruning: readers refitted to what calibration shows."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, cosine, run
from pruning_models import Branches, X, mlp, randn, small
from torch import nn

import quantize
from quantize.compression.pruning import prune_ln_structured


def test_repair_is_exact_for_redundant_channels():
    """Where removed channels are combinations of kept ones, the refit gives the same function
    back.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 3)).eval()  # 32 channels of rank 4
    x = randn(64, 4)
    pruned = prune_ln_structured(model, x, amount={"0": 0.5}, calibration=[x[:32], x[32:]])
    assert_close(pruned(x), model(x), factor=100)
    plain = prune_ln_structured(model, x, amount={"0": 0.5})
    assert cosine(plain(x), model(x)) < 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "residual", "decoder", "gated", "depthwise"])
def test_repair_helps(name):
    """On fresh data the repaired model is nearer to the original than the plain Ln choice."""
    model, example = small(name)
    draw = torch.Generator().manual_seed(3)

    def batch():
        if name == "decoder":
            return torch.randint(0, 64, (16, 8), generator=draw)
        return torch.randn(256, *example.shape[1:], generator=draw)

    calibration, fresh = [batch() for _ in range(4)], batch()
    plain = prune_ln_structured(model, example)
    repaired = prune_ln_structured(model, example, calibration=calibration)
    error = lambda m: (run(m, fresh) - run(model, fresh)).square().mean()  # noqa: E731
    assert error(repaired) < 0.8 * error(plain)


def test_constant_inputs():
    """A singular second moment (one row, dead inputs) gives a finite model."""
    model = mlp()
    x = torch.ones(1, 8)
    pruned = prune_ln_structured(model, x, calibration=[x, torch.zeros(1, 8)])
    assert torch.isfinite(pruned(x)).all()


class Experts(Branches):
    """Of two experts, one runs when asked."""

    def build(self):
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)) for _ in range(2)
        )

    def forward(self, x, both=True):
        y = self.experts[0](x)
        return y + self.experts[1](x) if both else y


def test_what_calibration_never_reaches_is_left():
    """A layer whose readers no batch runs keeps its channels, by name; only when nothing else is
    left it is an error.
    """
    model, example, batches = Experts(), (X, True), [(X, False)]
    pruned = prune_ln_structured(model, example, calibration=batches)
    assert [e[0].out_features for e in pruned.experts] == [16, 32]
    assert "never reaches layer 'experts.1.2'" in quantize.summary(pruned).left["experts.1.0"]
    with pytest.raises(ValueError, match=r"never reaches layer 'experts.1.2'"):
        prune_ln_structured(model, example, calibration=batches, amount={"experts.1.0": 0.5})
