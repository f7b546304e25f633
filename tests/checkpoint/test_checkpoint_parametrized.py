"""Modules that compute their weights, or keep results of a computation, come back from a file as
they were.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from quantize.checkpoint import load, save

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Keeps(nn.Module):
    """Keeps an activation, and a buffer that no file has."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mask", torch.arange(8.0), persistent=False)

    def forward(self, x):
        self.last = self.linear(x) * self.mask
        return self.last


MAKES = {
    "weight_norm": lambda: nn.Sequential(nn.Linear(8, 8), weight_norm(nn.Linear(8, 4))),
    "spectral_norm": lambda: nn.Sequential(nn.Linear(8, 8), spectral_norm(nn.Linear(8, 4))),
    "pruning mask": lambda: nn.Sequential(
        nn.Linear(8, 8), prune.l1_unstructured(nn.Linear(8, 4), "weight", 0.5)
    ),
    "new weight_norm": lambda: nn.Sequential(
        nn.Linear(8, 8), parametrizations.weight_norm(nn.Linear(8, 4))
    ),
    "new spectral_norm": lambda: nn.Sequential(
        nn.Linear(8, 8), parametrizations.spectral_norm(nn.Linear(8, 4))
    ),
    "orthogonal": lambda: nn.Sequential(
        nn.Linear(8, 8), parametrizations.orthogonal(nn.Linear(8, 4))
    ),
    "kept activation": lambda: nn.Sequential(Keeps()),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("name", MAKES)
def test_computed_weights_come_back(tmp_path, name, used, suffix):
    """Same outputs and same weight, read before the first call too, whether or not the models were
    trained before.
    """
    torch.manual_seed(1)
    model, fresh = MAKES[name](), MAKES[name]()
    if used:
        for each in (model, fresh):
            each(X).sum().backward()
    model.eval()
    expected = model(X)
    save(model, tmp_path / f"m{suffix}")
    loaded = load(tmp_path / f"m{suffix}", fresh)
    if hasattr(model[-1], "weight"):
        assert torch.equal(loaded[-1].weight, model[-1].weight)
    assert torch.equal(loaded(X), expected)
