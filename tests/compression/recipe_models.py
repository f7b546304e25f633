"""A network, batches and steps that the tests of recipes share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from quantize import Given, Half, Int4, Int8, LowRank, Prune, Recipe, Recover, Student
from quantize.compression.recipe import Step


def network() -> nn.Module:
    torch.manual_seed(0)
    body = (nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    return nn.Sequential(*body).eval()


def batches(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 32, generator=generator) for _ in range(count)]


def things() -> Given:
    x = batches()
    return Given(example_inputs=x[0], calibration=x, batches=x, seed=3)


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


LOW_RANK = LowRank(0.6, only_faster=False)


RECIPES = [
    Recipe([Prune(0.5)]),
    Prune({"0": 0.5}) >> Recover(3),
    Prune(0.5) >> Recover(3) >> Int8(),
    LOW_RANK >> Recover(2) >> Half("bfloat16"),
    Prune(0.25) >> LOW_RANK >> Recover(2) >> Int8(),
    Prune(0.5) >> Recover(1) >> Prune(0.5) >> Recover(1) >> Int4(),
    Student(2, width=0.5) >> Int8(),
    Recipe([Int8(smooth=True)]),
    Recipe([Half()]),
]


@dataclass(frozen=True)
class Counted(Step):
    """Adds to the first bias, and counts."""

    amount: float
    part = "counted"
    calls = []  # noqa: RUF012

    def __call__(self, model, given):
        self.calls.append((self.amount, given.recipe.name))
        if self.amount < 0:
            raise RuntimeError("below zero")
        copy = network()
        copy.load_state_dict(model.state_dict())
        copy[0].bias.data.add_(self.amount)
        return copy
