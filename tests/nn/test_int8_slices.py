"""Programs that run slice by slice: the bits of the steps one after the other, and one slice where
rows of one batch read those of another.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import randn
from torch import Tensor, nn
from torch.nn import functional as F

from quantize import quantize_dynamic
from quantize.nn import int8_kernels as kernels
from quantize.nn import replay
from quantize.nn.stretches import Stretch

ROWS = 96  # of a batch, as a slice has at least

Change = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """Attention with a position added, a feed-forward layer, and the first row of each batch.
    inside: changes what lies between.
    """

    def __init__(self, inside: Change) -> None:
        super().__init__()
        self.norm, self.inside = nn.LayerNorm(32), inside
        self.joint, self.up, self.down = nn.Linear(32, 96), nn.Linear(32, 64), nn.Linear(64, 32)
        self.first = nn.Linear(32, 20)
        self.position = nn.Parameter(randn(1, ROWS, 32))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        x = self.norm(x + self.position)
        heads = [y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.joint(x).split(32, -1)]
        x = x + F.scaled_dot_product_attention(*heads, mask).transpose(1, 2).flatten(2)
        x = self.inside(self.down(F.gelu(self.up(x))) + x)
        return self.norm(x), self.first(x[:, 0])


def int8(inside: Change) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(Block(inside), nn.Identity()).eval()
    return quantize_dynamic(model, prefer="size")[0]


def slices_of(block: Any, *inputs: Tensor) -> set[int]:
    """Of the programs that run for these inputs, once they gave the bits of the forward."""
    for _ in range(4):
        actual = block(*inputs)
    expected = replay.plainly(lambda: type(block).own_forward(block, *inputs))
    assert all(map(torch.equal, actual, expected))
    tapes = replay._regions[block].tapes.values()
    *_, tape = (tape for tape in tapes if tape is not None)
    calls = [step.call for step in tape.steps]
    return {call.program.slices for call in calls if isinstance(call, Stretch)}


@pytest.fixture(autouse=True)
def native_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Don't time kernels against each other."""
    monkeypatch.setattr(kernels, "_fastest", lambda *_: kernels.native)
    monkeypatch.setattr(kernels, "_chosen", {})


@pytest.mark.parametrize("threads", [1, 2, 3])
@torch.no_grad()
def test_the_bits_of_the_steps(level: str, monkeypatch: pytest.MonkeyPatch, threads: int):
    """With slices left that threads share out, with masks for all batches and for each."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    block = int8(lambda x: x)
    for batch in (3, 5):
        x = randn(batch, ROWS, 32)
        assert slices_of(block, x) == {batch}
        assert slices_of(block, x, randn(1, 1, ROWS, ROWS)) == {batch}
        assert slices_of(block, x, randn(batch, 1, ROWS, ROWS) > 0) == {batch}
    assert slices_of(block, randn(1, ROWS, 32)) == {1}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # others than it was made for
    assert all(map(torch.equal, block(x), replay.plainly(lambda: block.own_forward(x))))


def _other_batches(x: Tensor) -> Tensor:
    return x.transpose(0, 1).reshape(x.shape) + x


MIXED: dict[str, Change] = {
    "the first batch": lambda x: x + x[:1],
    "batches in another order": _other_batches,
    "attention along batches": lambda x: (
        F.scaled_dot_product_attention(*[x.unflatten(-1, (2, 16)).permute(1, 2, 0, 3)] * 3)
        .permute(2, 0, 1, 3)
        .flatten(2)
    ),
    "one behind the other": lambda x: torch.cat([x[1:], x[:1]]),
}


@pytest.mark.parametrize("name", MIXED)
@torch.no_grad()
def test_batches_that_read_each_other(name: str):
    """They are one slice."""
    assert slices_of(int8(MIXED[name]), randn(4, ROWS, 32)) == {1}
