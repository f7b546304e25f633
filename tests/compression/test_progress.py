"""Long calls say what they do and how long it will take."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial

import pytest
from helpers import in_int8, linear, randn
from torch import nn

import quantize

# Of those that run a model on batches, these report each step to `on_progress` of `fit`.
TRAINED = {"distill", "recover"}
INPUTS = [randn(16, 32), randn(16, 32, seed=1)]
GIVEN = {"calibration": INPUTS}


def exact_int8(model: nn.Module, progress: Callable[[str], None]) -> nn.Module:
    """int8 in some of the layers, so that the outputs stay nearer than with all."""
    whole = quantize.summary(in_int8(model, **GIVEN)).distance
    return in_int8(model, max_error=0.7 * whole, progress=progress, **GIVEN)


TRANSFORMS: dict[str, Callable[..., nn.Module]] = {
    "int8, fast": partial(quantize.quantize_dynamic, **GIVEN),
    "int8, exact": exact_int8,
    "int4": partial(quantize.quantize_weights, **GIVEN),
    "pruned": partial(quantize.prune_ln_structured, example_inputs=INPUTS[0], **GIVEN),
    "student": partial(quantize.make_student, width=0.5, example_inputs=INPUTS[0], **GIVEN),
    "low rank": partial(quantize.factorize_low_rank, only_faster=False, **GIVEN),
    "fused": partial(quantize.fuse, example_inputs=INPUTS[0]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.usefixtures("no_clock")
@pytest.mark.filterwarnings("ignore:no layer of:UserWarning")
def test_steps_are_told_with_the_time_left(name: str) -> None:
    """A line before each layer, with its number, how many there are, and the seconds left."""
    layers = linear(32, 64), nn.GELU(), linear(64, 64, seed=1), nn.GELU(), linear(64, 32, seed=2)
    lines: list[str] = []
    TRANSFORMS[name](nn.Sequential(*layers).eval(), progress=lines.append)
    later = [line for line in lines if re.search(r"\([2-9]/[2-9]\), \d+ s left$", line)]
    assert later, lines


def test_calls_that_run_batches_can_tell() -> None:
    """All of them take `progress`."""
    for name in quantize.__all__:
        function = getattr(quantize, name)
        if inspect.isfunction(function) and name not in TRAINED:
            parameters = inspect.signature(function).parameters
            assert "calibration" not in parameters or "progress" in parameters, name
