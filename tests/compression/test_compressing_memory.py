"""What compressing holds at once, in the bytes that torch's allocator gave: a model's outputs may
be larger than the model (a vocabulary's logits), and must not be held many times over.
"""

from __future__ import annotations

import itertools
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
    return max(_bytes(run))


def left_bytes(run: Callable[[], Any]) -> int:
    """How much more memory of tensors on the CPU is in use afterwards."""
    return _bytes(run)[-1]


def _bytes(run: Callable[[], Any]) -> list[int]:
    """Bytes of tensors on the CPU, from zero on, after each change."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return list(itertools.accumulate(changes, initial=0))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of comparisons that are small beside these outputs."""
    monkeypatch.setattr(calibration.differences, "BLOCK", 2**15)
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


class Stack(nn.Module):
    """Residual blocks, wide inside."""

    def __init__(self, depth: int, hidden: int):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ModuleList(nn.Linear(64, hidden) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(hidden, 64) for _ in range(depth))

    def forward(self, x):
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.tanh(up(x)))
        return x


def test_the_search_for_streams_holds_no_copies():
    """Each block leaves what its hidden layer gives and what comes of that, nothing for weights."""
    depth, hidden, rows = 12, 256, 512
    model = Stack(depth, hidden).eval()
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    inputs = torch.randn(rows, 64)
    peak = peak_bytes(lambda: calibration.find_streams(model, inputs, names))
    assert peak < 2.7 * depth * 4 * rows * hidden


@pytest.mark.slow
def test_moments_of_gradients_are_held_by_halves():
    """What a survey leaves is no more than the moments on and above their diagonals."""
    depth, hidden = 2, 2048
    model = Stack(depth, hidden).eval()
    layers = {f"up.{place}": (64, hidden) for place in range(depth)}
    kept: list[calibration.Survey] = []
    batches = [torch.randn(hidden // 2, 64)] * 2

    def look() -> None:
        kept.append(calibration.Survey(model, batches, layers))

    assert left_bytes(look) < 0.6 * depth * 4 * hidden**2
    moment = kept[0].gradient("up.0")
    assert isinstance(moment, torch.Tensor) and torch.equal(moment, moment.T)


def test_what_gradients_need_goes_to_files_past_a_limit(monkeypatch):
    """Of a deep model's activations memory holds as many bytes as it may, and the moments are the
    same.
    """
    depth, hidden, rows = 12, 128, 1024
    model = Stack(depth, hidden).eval()
    batches = [torch.randn(rows, 64)]
    moments: list[torch.Tensor] = []

    def look() -> None:
        survey = calibration.Survey(model, batches, {"up.0": (64, hidden)})
        moments.append(calibration.whole(survey.gradient("up.0")))

    whole = peak_bytes(look)
    monkeypatch.setattr(calibration.look, "SAVED", 4 * rows * hidden)
    assert peak_bytes(look) < whole - 0.8 * (depth - 2) * 4 * rows * hidden
    assert torch.equal(*moments)
