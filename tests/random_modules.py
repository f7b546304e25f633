"""Modules of random models: around layers, and with state."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Last(nn.Module):
    """A module over the last axis, or over axis 1 moved there and back; takes the first of several
    results.
    """

    def __init__(self, inner: nn.Module, *, moved: bool = False) -> None:
        super().__init__()
        self.inner, self.moved = inner, moved

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x.transpose(1, -1) if self.moved else x)
        y = y[0] if isinstance(y, tuple) else y
        return y.transpose(1, -1) if self.moved else y


class Attention(nn.Module):
    """Multi-head self-attention on one projection, or torch's own module."""

    def __init__(self, width: int, heads: int, own: bool) -> None:
        super().__init__()
        self.heads = heads
        self.inner = (
            nn.Linear(width, 3 * width)
            if own
            else nn.MultiheadAttention(width, heads, batch_first=True)
        )
        self.out = nn.Linear(width, width) if own else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.out is None:
            return self.inner(x, x, x)[0]
        heads = self.inner(x).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*heads)
        return x + self.out(y.transpose(1, 2).reshape(x.shape))


class Scale(nn.Module):
    """A learnt vector on the last axis or the channels, or a bias that is a view of a table."""

    def __init__(self, size: int, kind: str) -> None:
        super().__init__()
        self.table, self.kind = nn.Parameter(torch.randn(size + 3)), kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        vector = self.table[: x.shape[1 if self.kind == "channels" else -1]]
        if self.kind == "channels":
            return x * vector.reshape(-1, *[1] * (x.dim() - 2))
        return x + vector if self.kind == "bias" else x * vector


class Twice(nn.Module):
    """One layer that is used twice, or a low-rank pair."""

    def __init__(self, width: int, shared: bool) -> None:
        super().__init__()
        self.down = nn.Linear(width, width if shared else 2, bias=shared)
        self.up = self.down if shared else nn.Linear(2, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))


class Split(nn.Module):
    """Query, key and value like projections of one input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Linear(width, 6),
            nn.Linear(width, 6, bias=False),
            nn.Linear(width, 6),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.a(x)) * self.b(x) + self.c(x)


class Stateful(nn.Module):
    """State that a forward changes. `kind` says which and how."""

    KINDS = (
        "assigned",
        "written",
        "average",
        "counted",
        "buffer counted",
        "kept",
        "kept list",
        "queue",
        "lazy",
        "attribute",
        "attribute written",
        "old returned",
        "delayed",
        "every third",
        "shifted",
    )

    def __init__(self, kind: str, x: torch.Tensor) -> None:
        super().__init__()
        self.kind, self.count, self.cache, self.kept = kind, 0, None, None
        self.register_buffer("state", torch.zeros_like(x[0]))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.loose, self.queue = torch.zeros_like(x[0]), []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, "_" + self.kind.replace(" ", "_"))(x)

    def _assigned(self, x: torch.Tensor) -> torch.Tensor:
        self.state = torch.tanh(x.mean(0) + self.state)
        return x + self.state

    def _written(self, x: torch.Tensor) -> torch.Tensor:
        self.state.copy_(torch.tanh(x.mean(0) + self.state))
        return x * self.state.clone()

    def _average(self, x: torch.Tensor) -> torch.Tensor:
        self.state.mul_(0.9).add_(0.1 * x.mean(0))
        return x - self.state

    def _counted(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x * self.count

    def _buffer_counted(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x / self.calls

    def _kept(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = x * 2
        return self.kept + 1

    def _kept_list(self, x: torch.Tensor) -> torch.Tensor:
        self.queue = [x * 2, x + 1]
        return self.queue[0] * self.queue[1]

    def _queue(self, x: torch.Tensor) -> torch.Tensor:
        self.queue = [*self.queue[-2:], x.mean(0)]
        return x + sum(self.queue)

    def _lazy(self, x: torch.Tensor) -> torch.Tensor:
        if self.cache is None:
            self.cache = x.mean(0)
        return x - self.cache

    def _attribute(self, x: torch.Tensor) -> torch.Tensor:
        self.loose = 0.5 * self.loose + x.mean(0)
        return x + self.loose

    def _attribute_written(self, x: torch.Tensor) -> torch.Tensor:
        self.loose.add_(x.mean(0))
        return x + self.loose

    def _old_returned(self, x: torch.Tensor) -> torch.Tensor:
        old, self.state = self.state, x.mean(0)
        return old.expand_as(x)

    def _delayed(self, x: torch.Tensor) -> torch.Tensor:
        y, self.state = x + self.state, x.sum(0)
        return y

    def _every_third(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x * 2 if self.count % 3 == 0 else x

    def _shifted(self, x: torch.Tensor) -> torch.Tensor:
        self.state[..., 1:] = self.state[..., :-1].clone()
        self.state[..., 0] = x.mean(0)[..., 0]
        return x + self.state
