"""What compressing holds at once, in the bytes that torch's allocator gave: a model's outputs may
be larger than the model (a vocabulary's logits), and must not be held many times over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import tokens
from torch import nn
from torch.profiler import ProfilerActivity, profile

from quantize import calibration, factorize_low_rank, prune_ln_structured

WIDTH, VOCABULARY, ROWS = 32, 8192, 128
OUTPUT = 4 * ROWS * VOCABULARY  # bytes
MODEL = 4 * VOCABULARY * WIDTH


class Tied(nn.Module):
    """A language model of little more than its table, which gives the logits too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.down(self.up(x).relu())
        return x @ self.table.weight.T


def peak_bytes(run: Callable[[], Any]) -> int:
    """How far the memory of tensors on the CPU rises."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of comparisons that are small beside these outputs."""
    monkeypatch.setattr(calibration.inputs, "BLOCK", 2**15)
    monkeypatch.setattr(calibration.gradients, "BLOCK", 2**15)


@pytest.mark.parametrize("technique", ["pruned", "low_rank"])
def test_few_outputs_are_held_at_once(technique):
    """Of all calls that choose, prove and measure, three outputs are there at a time, and as many
    models: the two that are compared, and what they are made of.
    """
    model = Tied().eval()
    batches = [tokens(4, ROWS // 4, vocabulary=VOCABULARY, seed=seed) for seed in (0, 1)]

    def compress() -> nn.Module:
        if technique == "pruned":
            return prune_ln_structured(model, batches[0], calibration=batches)
        return factorize_low_rank(model, calibration=batches, only_faster=False)

    assert peak_bytes(compress) < 3.5 * OUTPUT + 3 * MODEL


def test_a_loss_over_a_vocabulary_holds_its_gradient_alone():
    """Beside the logits and what is drawn at a time."""
    logits = torch.randn(ROWS, VOCABULARY, requires_grad=True)
    generator = torch.Generator().manual_seed(0)

    def back() -> None:
        loss = calibration.fisher_loss(logits, categories=True, generator=generator)
        torch.autograd.grad(loss, logits)

    assert peak_bytes(back) < 1.5 * OUTPUT
