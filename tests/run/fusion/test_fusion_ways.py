"""Which of the ways to build a fused model is taken, by their times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close, randn
from torch import nn

from quantize.run.fusion import planning


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
        rewritten = (planning.SIMPLE, planning.KERNELS, planning.MERGED)
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
