"""The network that the tests of calibration look into."""

from __future__ import annotations

import torch
from torch import nn


class TwoInputs(nn.Module):
    """Two layers on one input, one behind them, one that only runs when asked."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.c = nn.Linear(5, 3)
        self.rare = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, rare: bool = False) -> torch.Tensor:
        y = self.c(self.act(self.a(x) + self.b(x)))
        return y + self.rare(x) if rare else y
