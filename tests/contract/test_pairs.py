"""Transforms compose: every ordered pair works or is refused by name, on a few models that have a
layer for everyone.
"""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantize
from contract import invariants as promise
from contract.known import BROKEN_PAIRS, refused_pair
from contract.models import batches, build
from contract.transforms import TRANSFORMS

PAIRED = (
    "half fp16",
    "half bf16",
    "int8",
    "int8 smooth",
    "int4 calibrated",
    "pruned calibrated",
    "low rank calibrated",
    "student",
    "recovered",
    "fused",
    "folded",
)
# compute in bfloat16, which another order of operations rounds otherwise
COARSE = (
    "half bf16",
    "int4 calibrated",
)
MODELS = ("mlp", "decoder", "conv net")


@pytest.fixture(autouse=True)
def _quick(no_clock: None) -> None:
    """Candidates of a fusion don't race."""


@functools.cache
def first(transform: str, model: str) -> nn.Module | None:
    """The result of the first transform, made once; None where even that is refused."""
    made, inputs = build(model)
    try:
        return TRANSFORMS[transform].apply(made, inputs, batches(inputs))
    except (ValueError, TypeError):
        return None


def pairs() -> Iterator[Any]:
    """Every ordered pair on the first model, and on all with CONTRACT=whole; those with a compiler
    are slow.
    """
    whole = os.environ.get("CONTRACT") == "whole"
    for model in MODELS if whole else MODELS[:1]:
        for before in PAIRED:
            for after in PAIRED:
                marks = []
                if model != "mlp" or {"fused", "folded"} & {before, after}:
                    marks.append(pytest.mark.slow)
                if reason := BROKEN_PAIRS.get((before, after), {}).get(model):
                    marks.append(pytest.mark.xfail(strict=True, reason=reason))
                yield pytest.param(
                    before, after, model, marks=marks, id=f"{before}-{after}-{model}"
                )


@pytest.mark.parametrize(("before", "after", "model"), list(pairs()))
def test_pair(before: str, after: str, model: str, tmp_path: Path):
    """The second transform takes what the first one made, leaves it as it is, and its result can be
    copied and saved.
    """
    broken, refusal = examine(before, after, model, tmp_path)
    assert not broken, "\n".join(broken)
    expected = refused_pair(before, after, model)
    if expected:
        assert refusal, f"now works: strike it from the table (was refused with {expected!r})"
        assert expected in refusal
    else:
        assert not refusal, f"worked before: {refusal}"


def examine(before: str, after: str, model: str, folder: Path) -> tuple[list[str], str]:
    """Broken promises and the refusal of one pair."""
    given = first(before, model)
    if given is None:
        return [], f"{before} is refused"
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(11)
        return _examine(before, after, model, given, folder)


def _examine(
    before: str, after: str, model: str, given: nn.Module, folder: Path
) -> tuple[list[str], str]:
    _, inputs = build(model)
    transform = TRANSFORMS[after]
    state = None if TRANSFORMS[before].script else promise.state_of(given)
    try:
        result = transform.apply(given, inputs, batches(inputs))
    except Exception as error:
        return list(promise.honest(error)), f"{type(error).__name__}: {error}"
    broken = (
        []
        if state is None
        else [f"input: {c}" for c in promise.changes(state, promise.state_of(given))]
    )
    sequence = [inputs, *batches(inputs)]
    try:
        copies = []
        if not transform.script:
            copies = _copies(result, model, folder if transform.saved else None)
        actual = promise.answers(result, sequence)
    except Exception as error:
        return [*broken, f"{type(error).__name__}: {error}"], ""
    expected = promise.answers(given, sequence)
    bound = transform.bound
    if bound is not None and before in COARSE:
        bound = max(bound, 0.01)
    broken += promise.close_answers(actual, expected, bound, forms=not transform.script)
    for copied in copies:
        broken += promise.same_answers(promise.answers(copied, sequence), actual, "a copy")
    if not transform.script:
        broken += _steps(result, given)
    return broken, ""


def _copies(result: nn.Module, model: str, folder: Path | None) -> list[nn.Module]:
    copies = [copy.deepcopy(result)]
    if folder is not None:
        copies.append(
            promise.through_file(result, build(model, seed=1)[0], folder / "model.safetensors")
        )
    return copies


def _steps(result: nn.Module, given: nn.Module) -> list[str]:
    """The second transform's step is noted after those of the first."""
    earlier, later = quantize.summary(given).steps, quantize.summary(result).steps
    if len(later) <= len(earlier):
        return [f"summary: {len(later)} steps after {len(earlier)}"]
    if [step.technique for step in later[: len(earlier)]] != [step.technique for step in earlier]:
        return ["summary: the first step is gone"]
    return []
