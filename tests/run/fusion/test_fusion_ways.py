"""Which of the ways to build a fused model is taken, by their times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close, in_int8, randn
from torch import nn

from quantize.run.fusion import integers, planning


def image_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()).eval()


@pytest.mark.parametrize(("slow", "taken"), [(True, planning.EXPORTED), (False, planning.KERNELS)])
@torch.no_grad()
def test_a_way_that_loses_on_one_row_is_not_taken(slow: bool, taken: str, monkeypatch):
    """Kernels win on the example batch; where all rewritten ways are slower than the model on a
    batch of one, the graph as it was exported is built too, and wins.
    """
    asked: list[tuple[int, set[str]]] = []

    def race(models: dict[str, Any], inputs: Any, **_: Any) -> dict[str, float]:
        asked.append((len(inputs), set(models)))
        times = dict.fromkeys(models, 1.0) | {planning.KERNELS: 0.8}
        rewritten = (planning.SIMPLE, planning.KERNELS)
        if slow and len(inputs) == 1:
            times |= {name: 2.0 for name in models if name in rewritten}
        return times

    monkeypatch.setattr(planning, "race", race)
    model, x = image_model(), randn(4, 3, 8, 8)
    made = planning.plan(model, x)
    assert made.way == taken
    assert {rows for rows, _ in asked} == {1, 4}
    assert all(planning.ITSELF in names for _, names in asked)
    assert any(planning.EXPORTED in names for _, names in asked) == slow
    for batch in (x, x[:1]):
        assert_close(made.fused(batch), model(batch))


@pytest.mark.slow
@pytest.mark.parametrize("way", [planning.FLOATS, planning.KERNELS])
@torch.no_grad()
def test_int8_linear_layers_compute_in_float_where_that_is_faster(way: str, monkeypatch):
    """Else they are stock products of integers, and the file answers as the model does. Many of
    these aren't tried where a CPU is slow in them: a call may take minutes.
    """
    best = way, planning.KERNELS
    monkeypatch.setattr(planning, "race", lambda built, _: {n: 1 + (n not in best) for n in built})
    monkeypatch.setattr(integers, "available", lambda: True)
    torch.manual_seed(0)
    int8 = in_int8(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval())
    x = randn(4, 64)
    made = planning.plan(int8, x)
    assert made.way == way
    in_float = planning.in_floats(int8)
    assert_close(made.fused(x), (in_float if way == planning.FLOATS else int8)(x))
    assert not torch.equal(in_float(x), int8(x))
    monkeypatch.setattr(integers, "available", lambda: False)
    assert planning.plan(int8, x).way == way
    monkeypatch.setattr(planning, "_MOST_SLOW", 4 * 64 * (64 + 32) - 1)
    assert planning.plan(int8, x).way == planning.FLOATS


class Cancelling(nn.Module):
    """At 5 steps, not at 6, most of its output cancels: rounding to 8 bits is as large as what is
    left.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, 32]
        rest = (x.shape[1] - 4.99) * x.sum(1)
        return self.layer(x).sum(1) - self.layer(x.sum(1)) + rest


@pytest.mark.usefixtures("no_clock")
@torch.no_grad()
def test_layers_in_float_are_compared_in_float(monkeypatch):
    """A file of an int8 model in float isn't refused for what rounding does to the model itself at
    another size, and is exact there.
    """
    monkeypatch.setattr(integers, "available", lambda: False)
    monkeypatch.setattr(planning, "_MOST_SLOW", 0)
    torch.manual_seed(0)
    int8 = in_int8(Cancelling().eval())
    made = planning.plan(int8, randn(4, 6, 32))
    assert made.way == planning.FLOATS
    x = randn(4, 5, 32)
    expected = planning.in_floats(int8)(x)
    assert float((int8(x) - expected).norm() / expected.norm()) > 0.3
    assert_close(made.fused(x), expected)


class Squared(nn.Module):
    """Its output is as long as a whole number's square, as a grid of patches."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_ones((x.shape[-1] // 2) ** 2) * x.sum()


@pytest.mark.usefixtures("no_clock")
def test_a_power_of_a_size_is_a_whole_number():
    """Which a power of two integers is in Python, and not in TorchScript."""
    fused = planning.plan(Squared(), torch.ones(2, 6)).fused
    for size in (6, 9):
        assert_close(fused(torch.ones(2, size)), Squared()(torch.ones(2, size)))
