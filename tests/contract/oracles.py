"""Oracles of the techniques on random models: what the result of each must compute.

- pruned: the full-sized twin with zeros in the removed places;
- low rank, int8, int4: the original with each layer's weight replaced by the dense weight that the
  layer stands for;
- half: the original with rounded parameters;
- fused: the original;
- each of them saved and loaded: the result in memory, bit for bit.

Allowed is what the original itself does when its weights are off by as much as the technique
rounds: a graph that turns the last bit of a weight into another answer can't be told from a wrong
one. Models run several calls, from their first state.
"""

from __future__ import annotations

import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers import in_int8
from random_models import Sample, random_model
from torch import nn

import quantize
from contract import invariants as promise
from quantize import surgery

SCALE = 8  # widths of 32 to 64
SECONDS = 60  # of computing for one technique on one model; more is a hang
CALLS = 3


class SilentDifference(Exception):
    """A result that is wrong without a word."""


class Hang(BaseException):
    """Raised by the alarm, past every `except Exception`."""


Make = Callable[[nn.Module, Sample], nn.Module]
Twin = Callable[[nn.Module, nn.Module, Sample], nn.Module]


@dataclass(frozen=True)
class Technique:
    """`make` gives the result, `twin(original, result, sample)` what it must compute; `rounding` is
    its relative error.
    """

    make: Make
    twin: Twin
    rounding: float
    saved: bool = True


# Oracles.


def _masked(original: nn.Module, result: nn.Module, sample: Sample) -> nn.Module:
    return quantize.prune_ln_structured(original, sample.inputs, masked=True)


def _original(original: nn.Module, result: nn.Module, sample: Sample) -> nn.Module:
    return original


@torch.no_grad()
def _dense(original: nn.Module, result: nn.Module, sample: Sample) -> nn.Module:
    """The original with the weights that the compressed layers stand for."""
    twin = surgery.clone(original)
    for name, layer in result.named_modules():
        if not hasattr(layer, "dense_weight"):
            continue
        try:
            place = twin.get_submodule(name)
        except AttributeError:  # inside a layer that was converted as a whole
            continue
        weight = place._parameters.get("weight")
        if weight is not None:
            weight.copy_(layer.dense_weight().reshape(weight.shape))
    return twin


def _rounded(dtype: torch.dtype) -> Twin:
    @torch.no_grad()
    def twin(original: nn.Module, result: nn.Module, sample: Sample) -> nn.Module:
        copy = surgery.clone(original)
        for parameter in copy.parameters():
            if parameter.is_floating_point():
                parameter.copy_(parameter.to(dtype))
        return copy

    return twin


TECHNIQUES = {
    "pruned": Technique(lambda m, s: quantize.prune_ln_structured(m, s.inputs), _masked, 1e-6),
    "low rank": Technique(lambda m, s: quantize.factorize_low_rank(m, ratio=0.7), _dense, 1e-6),
    "int8": Technique(lambda m, s: in_int8(m), _dense, 0.02),
    "int4": Technique(lambda m, s: quantize.quantize_weights(m), _dense, 0.01),
    "half fp16": Technique(lambda m, s: quantize.to_half(m), _rounded(torch.float16), 1e-3),
    "half bf16": Technique(
        lambda m, s: quantize.to_half(m, torch.bfloat16), _rounded(torch.bfloat16), 0.01
    ),
    "fused": Technique(lambda m, s: quantize.fuse(m, s.inputs), _original, 1e-6, saved=False),
}


# Runs.


def calls_of(sample: Sample) -> list[Any]:
    """Inputs of several calls: the example's, and others of its form."""
    return [sample.inputs, *(sample.fresh(i) for i in range(1, CALLS))]


def answers(model: nn.Module, calls: Sequence[Any]) -> list[Any]:
    """Outputs call for call; the error in the place of an output where the model raises one."""
    found: list[Any] = []
    for call in calls:
        try:
            found += promise.answers(model, [call])
        except Exception as error:
            found.append(error)
    return found


@torch.no_grad()
def sensitivity(original: nn.Module, calls: Sequence[Any], size: float) -> list[float]:
    """How far each call's output goes when every weight is off by `size`, the worst of three
    draws.
    """
    expected = answers(surgery.clone(original), calls)
    worst = [0.0] * len(calls)
    for draw in range(3):
        noised = surgery.clone(original)
        generator = torch.Generator().manual_seed(draw)
        for parameter in noised.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.mul_(1 + size * noise.to(parameter.dtype))
        for i, (near, exact) in enumerate(zip(answers(noised, calls), expected, strict=True)):
            worst[i] = max(worst[i], _away(near, exact))
    return worst


def _away(actual: Any, expected: Any) -> float:
    if isinstance(expected, Exception) or isinstance(actual, Exception):
        return 0.0 if isinstance(expected, Exception) else float("inf")
    found, wanted = _numbers(actual), _numbers(expected)
    return promise.distance(found, wanted) if len(found) == len(wanted) else float("inf")


def _numbers(output: Any) -> list[torch.Tensor]:
    """The floating tensors: which of two equal numbers is the larger one, rounding may decide."""
    return [tensor for tensor in promise.tensors(output) if tensor.is_floating_point()]


def compare(
    result: nn.Module, twin: nn.Module, original: nn.Module, sample: Sample, rounding: float
) -> None:
    """Raise SilentDifference where the result answers other than its twin, from the same state,
    call for call.
    """
    calls = calls_of(sample)
    expected, actual = answers(twin, calls), answers(result, calls)
    coarse = any(p.dtype in (torch.float16, torch.bfloat16) for p in original.parameters())
    rounding = max(rounding, 0.01 if coarse else 0.0)
    allowed = None
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if isinstance(e, Exception):
            continue
        if isinstance(a, Exception):
            if isinstance(result, torch.jit.ScriptModule) and i:
                return  # refuses another size; its state may have gone another way from here
            raise a
        if _away(a, e) <= 5 * rounding:
            continue
        allowed = allowed or sensitivity(original, calls, rounding)
        if not _away(a, e) <= 10 * allowed[i] + 5 * rounding:
            raise SilentDifference(f"call {i + 1} is {_away(a, e):.2g} from its oracle")


def through_files(result: nn.Module, sample: Sample, seed: int, odd: bool, folder: Path) -> None:
    """Raise SilentDifference where the result, saved and loaded into a fresh model of other
    weights, answers otherwise.
    """
    fresh = random_model(seed, odd=odd, scale=SCALE).model
    fresh.output = sample.model.output
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.normal_()
    path = folder / f"model{promise.SUFFIXES[seed % 2]}"
    quantize.save(result, path)
    calls = calls_of(sample)
    expected = answers(surgery.clone(result), calls)
    actual = answers(quantize.load(path, model=fresh), calls)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if isinstance(e, Exception):
            continue
        if isinstance(a, Exception):
            raise a
        if list(promise.same_answers([a], [e], "file")):
            raise SilentDifference(
                f"call {i + 1} of the loaded file is {_away(a, e):.2g} from the model in memory"
            )


def examine(name: str, seed: int, odd: bool) -> tuple[str, str]:
    """Outcome ("ok", "refused", "crash", "hang", "silent difference") and message of one technique
    on one model.
    """
    sample = random_model(seed, odd=odd, scale=SCALE)
    if "output: parameter" in sample.traits and name != "fused":
        sample.model.output = (
            "tuple"  # its first parameter is another one once its layers are replaced
        )
    technique = TECHNIQUES[name]
    state, inputs = promise.state_of(sample.model), promise.frozen(sample.inputs)
    try:
        with limited(SECONDS), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            try:
                result = technique.make(sample.model, sample)
            except Exception as error:
                problems = list(promise.honest(error))
                return (
                    ("crash", problems[0])
                    if problems
                    else ("refused", f"{type(error).__name__}: {error}")
                )
            changed = [*promise.changes(state, promise.state_of(sample.model))]
            changed += promise.changes(inputs, promise.frozen(sample.inputs))
            if changed:
                return "silent difference", f"the input changed: {changed[0]}"
            if technique.saved:
                through_files(result, sample, seed, odd, Path(folder))
            twin = technique.twin(surgery.clone(sample.model), result, sample)
            compare(result, twin, sample.model, sample, technique.rounding)
    except SilentDifference as error:
        return "silent difference", str(error)
    except Hang:
        return "hang", f"over {SECONDS} s"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return (
            "crash",
            f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}",
        )
    return "ok", ""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise Hang inside after so many seconds of computing, however busy the machine is."""

    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
