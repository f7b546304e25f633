"""Structured pruning: readers refitted to what calibration shows."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, cosine, run
from pruning_models import Branches, X, mlp, randn, small
from torch import nn

import quantize
from quantize.calibration import Walk
from quantize.compression.pruning import prune_ln_structured, repair


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


class TwoNorms(nn.Module):
    """Convolutions whose outputs a BatchNorm reads: one by one, one norm twice, two of one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(c, 16, 3) for c in (3, 16, 16, 16))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(4))
        for norm in self.norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = self.norms[0](self.convs[0](x)).relu()
        x = self.norms[1](self.convs[1](x)).relu()
        x = self.norms[1](self.convs[2](x)).relu()
        x = self.convs[3](x)
        return self.norms[2](x) + self.norms[3](x)


def test_norms_are_estimated_from_what_a_refit_has_seen(monkeypatch):
    """With the same result as from passes of their own, in fewer of them."""
    model, batches = TwoNorms().eval(), [randn(4, 3, 12, 12), 0.5 * randn(4, 3, 12, 12)]
    shown: list[str] = []
    show = Walk.show

    def counted(self, models, names, *others):
        shown.append(",".join(names))
        return show(self, models, names, *others)

    monkeypatch.setattr(Walk, "show", counted)
    known = prune_ln_structured(model, batches[0], calibration=batches)
    few, shown[:] = list(shown), []
    monkeypatch.setattr(repair, "MOST_INPUTS", 0)
    passed = prune_ln_structured(model, batches[0], calibration=batches)
    assert few == ["convs.1", "convs.2", "norms.1", "convs.3", "norms.3"]
    assert sorted(shown) == sorted([*few, "norms.2"])
    for ours, theirs in zip(known.state_dict().values(), passed.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
