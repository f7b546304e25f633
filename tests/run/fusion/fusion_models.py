"""Models and inputs that the tests of fusion share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quantize.run.fusion import integers, planning
from quantize.run.fusion.equality import difference, outputs
from quantize.run.fusion.sizes import other_sizes


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and BatchNorm statistics, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
    return model.eval()


def fastest(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this way of a plan win, and else kernels."""
    best = way, planning.KERNELS
    monkeypatch.setattr(planning, "race", lambda built, _: {n: 1 + (n not in best) for n in built})


def in_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let int8 linear layers multiply in integers, as on a CPU where that is fast."""
    monkeypatch.setattr(integers, "available", lambda: True)
    fastest(planning.KERNELS, monkeypatch)


class Image(nn.Module):
    """Convolution, BatchNorm and activation with a residual add: what every CNN is made of."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor] = F.relu):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn2 = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.bn1(self.stem(x)))
        x = self.activation(self.bn2(self.depthwise(x)) + x)
        return self.head(self.dropout(x.mean((2, 3))))


def same_at_other_sizes(
    fused: Callable[..., Any], model: nn.Module, inputs: Any, *, refusal: str
) -> None:
    """Within 2e-5 of eager at every other size, or refused with a message that holds `refusal`; at
    least two are answered.
    """
    answered = 0
    for other in other_sizes(inputs):
        try:
            expected = outputs(model, other)
        except Exception:
            continue
        try:
            actual = outputs(fused, other)
        except torch.jit.Error as error:
            assert refusal in str(error)
            continue
        assert difference(actual, expected) <= 2e-5
        answered += 1
    assert answered >= 2  # twice the batch and a batch of one, at least
