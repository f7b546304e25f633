"""A model that is elsewhere than on the CPU is compressed like one that is there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import nn

from contract.odd_layers import Perceptron
from contract.transforms import TRANSFORMS
from quantize import Given, Int8, Prune, Recover, surgery

ELSEWHERE = "cuda" if torch.cuda.is_available() else "cpu"


def moved(value: Any, device: str) -> Any:
    """A tensor, or a list of them, or a copy of a model, on a device."""
    if isinstance(value, list):
        return [moved(part, device) for part in value]
    return copy.deepcopy(value).to(device)


@pytest.fixture
def case() -> tuple[nn.Module, list[torch.Tensor]]:
    """A model in eval mode and what calibrates it, on the CPU."""
    torch.manual_seed(0)
    return Perceptron().eval(), [torch.randn(64, 32) for _ in range(2)]


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "recovered"])
def test_transform_elsewhere(name: str, case: Any, no_clock: None):
    """The result is where the model was, and computes what the CPU's computes."""
    model, batches = case
    expected = TRANSFORMS[name].apply(model, batches[0], batches)(batches[1])
    there, given = moved(model, ELSEWHERE), moved(batches, ELSEWHERE)
    small = TRANSFORMS[name].apply(there, given[0], given)
    assert surgery.device_of(small).type == ELSEWHERE
    factor = 1e3 if "int4" in name else 100  # its products are in bfloat16 there
    assert_close(small(given[1]).cpu(), expected, factor=factor)


def test_recipe_elsewhere(case: Any):
    """Trainings run where the model is, and all steps take its batches."""
    model, batches = moved(case[0], ELSEWHERE), moved(case[1], ELSEWHERE)
    given = Given(batches[0], calibration=batches, batches=batches)
    small = (Prune(0.5) >> Recover(2) >> Int8(prefer="size"))(model, given)
    assert surgery.device_of(small).type == ELSEWHERE
    assert surgery.device_of(model).type == ELSEWHERE
    assert small(batches[0]).isfinite().all()


def test_at():
    """A model is copied where it isn't, and one without data is left to whoever looks at it."""
    model = nn.Linear(2, 2)
    assert surgery.at("cpu", model) is model
    assert surgery.at("cpu", model.to("meta")) is model
    assert surgery.at("meta", nn.Linear(2, 2)).weight.is_meta
    assert surgery.device_of(nn.ReLU()).type == "cpu"
    numbered = nn.Linear(2, 2)
    assert surgery.at("cpu:0", numbered) is not numbered  # the number of a device counts
