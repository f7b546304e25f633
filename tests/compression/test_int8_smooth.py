"""SmoothQuant: which layers alone read a norm, and what a fold keeps."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, linear, randn
from torch import nn

from quantize.compression import smooth


class Block(nn.Module):
    """Two layers that read a norm; the norm's output may be added to theirs."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.norm, self.residual = nn.LayerNorm(16), residual
        self.first, self.second = linear(16, 16), linear(16, 16, seed=1)
        with torch.no_grad():
            self.norm.weight[3] = 40

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        assert y.shape[-1] == self.first.in_features
        result = self.first(y) + self.second(y)
        return result + y if self.residual else result


@pytest.mark.parametrize("residual", [False, True])
@torch.no_grad()
def test_norms_that_only_layers_read_are_folded(residual: bool, monkeypatch: pytest.MonkeyPatch):
    """In one run more for all of them; one that somebody adds to something isn't even tried."""
    model = nn.Sequential(Block(residual), Block(False), Block(residual)).eval()
    x = randn(8, 16)
    expected = model(x)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    runs = []
    outputs = smooth.outputs
    monkeypatch.setattr(smooth, "outputs", lambda *given: runs.append(1) or outputs(*given))
    names = smooth.smooth(model, layers, [x])
    assert names == (["1.norm"] if residual else ["0.norm", "1.norm", "2.norm"])
    assert len(runs) == 3
    largest = [block.norm.weight.max() for block in model]
    assert [value < 40 for value in largest] == [f"{n}.norm" in names for n in range(3)]
    assert_close(model(x), expected, factor=20)


@torch.no_grad()
def test_folds_that_change_the_output_are_taken_back(monkeypatch: pytest.MonkeyPatch):
    """One of four, whose reader wasn't seen: the others stay."""
    model = nn.Sequential(*[Block(n == 2) for n in range(4)]).eval()
    monkeypatch.setattr(smooth._Reads, "__torch_function__", _unseen)
    x = randn(8, 16)
    expected = model(x)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert smooth.smooth(model, layers, [x]) == ["0.norm", "1.norm", "3.norm"]
    assert_close(model(x), expected, factor=20)


def _unseen(self, func, types, args=(), kwargs=None):
    return func(*args, **(kwargs or {}))
