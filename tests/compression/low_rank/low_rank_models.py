"""What the tests of low rank share: small models, correlated inputs, and which layers are pairs."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from quantize.nn.low_rank import LowRankConv1d, LowRankConv2d, LowRankLinear

PAIRS = (LowRankLinear, LowRankConv1d, LowRankConv2d)


def mlp(*widths: int, bias: bool = True, seed: int = 0) -> nn.Sequential:
    """Linears of these widths with GELU between them."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), nn.GELU()]
    return nn.Sequential(*layers[:-1]).eval()


def data(width: int, rows: int = 512, batches: int = 2, seed: int = 0) -> list[torch.Tensor]:
    """Correlated inputs with a mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.linspace(1, 0.02, width)[:, None]
    return [torch.randn(rows, width, generator=generator) @ mix + 0.5 for _ in range(batches)]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def pairs_in(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, PAIRS)}
