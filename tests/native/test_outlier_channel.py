"""int8 on a post-norm encoder whose rows have one channel with nearly all of their energy, as
published sentence encoders do.
"""

from __future__ import annotations

import pytest
import torch
from helpers import cosine, in_int8, randn
from torch import Tensor, nn

import quantize
from quantize.nn import int8_kernels as kernels
from quantize.nn import int8_stock

WIDTH, DOMINANT = 96, 17


class Block(nn.Module):
    """A feed-forward block with its norm after the residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(nn.functional.gelu(self.up(x))))


def encoder() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [Block() for _ in range(4)]
    with torch.no_grad():
        for block in blocks:
            block.norm.bias[DOMINANT] = 40.0
            block.up.weight[:, DOMINANT] *= 0.02  # trained weights bring it down to the others
    return nn.Sequential(*blocks).eval()


def symmetric_rows(x: Tensor) -> kernels.Rows:
    """Rows in 8 bits around zero, in 127 steps on either side."""
    step = x.abs().amax(-1, keepdim=True) / 127
    return kernels.Rows((x / step).round().to(torch.int8), step, torch.zeros_like(step).int())


def distance(model: nn.Module, expected: Tensor, x: Tensor) -> float:
    """1 - cosine over the channels that differ: the dominant one alone makes all rows alike."""
    keep = [i for i in range(WIDTH) if i != DOMINANT]
    return 1 - cosine(model(x)[:, keep], expected[:, keep])


@torch.no_grad()
def test_a_zero_point_halves_the_distance(monkeypatch: pytest.MonkeyPatch):
    """The dominant channel is one-sided, so a row's own zero point makes its steps half as wide:
    1 - cosine to float is less than half of what steps around zero give. With calibration the
    channel counts in float, or the others are evened out with it: it is less than a fifth.
    """
    model, x = encoder(), randn(64, WIDTH)
    expected = model(x)
    small = in_int8(model)
    calibrated = in_int8(model, calibration=[randn(64, WIDTH, seed=1)])
    affine, apart = (distance(m, expected, x) for m in (small, calibrated))
    monkeypatch.setattr(int8_stock, "quantize_rows", symmetric_rows)
    with kernels.kernel("reference"):
        symmetric = distance(small, expected, x.clone())
    assert 0 < 2 * affine < symmetric
    assert affine < 5e-4
    assert 0 < 5 * apart < symmetric and 2 * apart < affine
    done = quantize.summary(calibrated).done
    assert done["3.up"] == "int8, 1 outlier channel in float" and done["3.down"] == "int8"
