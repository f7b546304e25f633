"""Small models with what makes it hard to take a module's output from an earlier pass."""

from __future__ import annotations

import torch
from torch import nn


def linear(width: int = 8) -> nn.Module:
    return nn.Linear(width, width)


class Skips(nn.Module):
    """Outputs of early blocks are read by late ones, and one by no module at all."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Sequential(linear(), nn.ReLU()) for _ in range(3))
        self.up = nn.ModuleList(nn.Sequential(linear(), nn.ReLU()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
        for block in self.up:
            x = block(x) + kept.pop()
        return x


class InPlace(nn.Module):
    """Writes into inputs and outputs of its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ReLU(inplace=True), linear(), nn.ReLU(inplace=True)) for _ in range(3)
        )
        self.last = linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            y = block(x)
            x = y.add_(x).mul_(0.5)
        return self.last(x)


class Counting(nn.Module):
    """Its second block gives other numbers at its second call, and tells the last one by state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = Stepping(), Stepping(), linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.second(self.first(x)))
        return self.last(x + self.second.calls)


class Stepping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = linear(), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(x).tanh() * self.calls


class Noisy(nn.Module):
    """Draws random numbers, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Noise() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + torch.rand(8)


class Cached(nn.Module):
    """Blocks write into a dict that is handed on, and read what others wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Remembering() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory: dict[str, torch.Tensor] = {}
        for block in self.blocks:
            x = block(x, memory)
        return x


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: torch.Tensor, memory: dict[str, torch.Tensor]) -> torch.Tensor:
        y = self.layer(x + sum(memory.values()))
        memory[str(len(memory))] = y
        return y.relu()


class Shared(nn.Module):
    """One block runs before and after another."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.between = nn.Sequential(linear(), nn.Tanh()), linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.twice(self.between(self.twice(x)))


class Views(nn.Module):
    """Blocks return their input, parts of it, tuples, dicts and nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.parts, self.last = nn.Identity(), Parts(), linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, (right, nothing), named = self.parts(self.same(x))
        assert nothing is None
        left.add_(1)
        return self.last(torch.cat([left, right], -1) + named["sum"] + x)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: torch.Tensor) -> tuple:
        y = self.layer(x)
        return y[:, :4], (y[:, 4:], None), {"sum": x.sum(-1, keepdim=True)}


ODD = {c.__name__: c for c in (Skips, InPlace, Counting, Noisy, Cached, Shared, Views)}
