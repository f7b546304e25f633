"""A block of int8 layers whose forward may do anything, and whether its calls are recorded."""

import ctypes
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantize import quantize_dynamic
from quantize.nn import replay
from quantize.nn.int8_region import Region

FACTOR = 1.0


# Counts forwards of blocks; a number in C, so that nothing takes it for what they depend on.
RUNS = ctypes.c_long(0)


class Inner:
    """What a module may hold: an object with a state, which can be called."""

    rate = 1.0

    def __init__(self) -> None:
        self.factor, self.last = 1.0, deque([0.0, 0.0], 2)

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor

    def known(self) -> float:
        """What its code names."""
        return FACTOR


class Block(nn.Module):
    """Attention with a norm, after whatever else a forward may do."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.drop, self.act = nn.Dropout(0.5), nn.GELU()
        self.register_buffer("count", torch.zeros(()))
        inner = Inner()
        self.config = types.SimpleNamespace(causal=False, inner=inner, rope={"factors": [1.0]})
        self.more: Callable[[Block, Tensor], Tensor] | None = None
        self.kept: list[Any] = []
        self.calls, self.last = 0, None

    def forward(self, x: Tensor, mask: Tensor | None = None, *, names: bool = False) -> Any:
        RUNS.value += 1
        heads = (*x.shape[:-1], 4, -1)
        q, k, v = (f(x).view(heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.config.causal)
        x = self.norm(x + self.drop(self.out(y.transpose(1, 2).flatten(2))))
        x = torch.cat(torch.stack([x, self.down(self.act(self.up(x)))]).unbind())
        x = x if self.more is None else self.more(self, x)
        return {"x": x, "rest": (x[:1], None)} if names else x


def int8(change: Callable[[Block], object] = lambda block: None) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(Block(), nn.Identity()).eval()
    change(model[0])
    small: Any = quantize_dynamic(model, prefer="size")[0]
    assert isinstance(small, Region) and type(small).__name__ == "Block"
    return small


def own(block: Any, *args: Any, **kwargs: Any) -> Any:
    """What the block's forward gives."""
    return replay.plainly(lambda: type(block).own_forward(block, *args, **kwargs))


def tapes(block: Any) -> list[tuple[Any, Any]]:
    return list(replay._regions[block].tapes.items())


def is_replayed(block: Any, *args: Any, **kwargs: Any) -> bool:
    """Does a fourth call do without the forward, and give its result?"""
    for _ in range(3):
        block(*args, **kwargs)
    RUNS.value = 0
    actual = block(*args, **kwargs)
    replayed = not RUNS.value
    expected = own(block, *args, **kwargs)
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys() and actual["rest"][1] is None
        actual, expected = actual["rest"][0], expected["rest"][0]
    assert torch.equal(actual, expected) and actual.stride() == expected.stride()
    return replayed
