"""Programs of int8 convolutions hold no longer than what their forward depends on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import in_int8, randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F

from quantize.nn.int8_region import Region, program_of

ADDS = {"now": True}


class Chooses(nn.Module):
    """Its sum depends on an attribute and on a variable."""

    adds = True

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(32, 48, 1), nn.Conv2d(48, 32, 3, padding=1)
        self.ran = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(F.relu(self.first(x)))
        return y + x if self.adds and ADDS["now"] else y


class Counts(Chooses):
    """Its forward changes it."""

    def forward(self, x: Tensor) -> Tensor:
        self.ran += 1
        return super().forward(x)


def region(make: Callable[[], nn.Module]) -> Any:
    model = seeded(lambda: nn.Sequential(make(), nn.Flatten()))
    found = in_int8(model, calibration=[randn(2, 32, 12, 12)])[0]
    assert isinstance(found, Region)
    return found


CHOICES: dict[str, Callable[[Any], object]] = {
    "an attribute": lambda module: setattr(module, "adds", False),
    "an attribute of the class": lambda module: setattr(Chooses, "adds", False),
    "a variable": lambda module: ADDS.__setitem__("now", False),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CHOICES)
def test_what_a_forward_depends_on_may_change(name: str, monkeypatch: pytest.MonkeyPatch):
    """The program is that of the forward as it is now."""
    monkeypatch.setattr(Chooses, "adds", True)  # and put them back
    monkeypatch.setitem(ADDS, "now", True)
    module, x = region(Chooses), randn(2, 32, 8, 8)
    before = module(x)
    assert program_of(module, x.shape) is not None
    CHOICES[name](module)
    actual = module(x)
    assert torch.equal(actual, type(module).own_forward(module, x))
    assert not torch.equal(actual, before) and program_of(module, x.shape) is not None


@torch.no_grad()
def test_a_forward_that_counts_its_calls():
    """It runs itself, each time."""
    module, x = region(Counts), randn(2, 32, 8, 8)
    module(x)
    before = module.ran
    for _ in range(3):
        module(x)
    assert module.ran == before + 3 and program_of(module, x.shape) is None
