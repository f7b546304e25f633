"""The stopwatch behind every latency that is reported or decides something: how long calls take,
side by side.

Contenders take turns, so that a moment in which the machine is slow hits all of them, and medians
count, so that one interrupted call doesn't. They run under `torch.no_grad`, as `generate` runs
models and most users do: `torch.inference_mode` gives tensors without a version counter, by
which int8 layers know that they have quantized an input before. Whole files are measured in fresh
processes by `quantize.measuring`, which times with this stopwatch too. Left out: devices that
compute asynchronously.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from quantize import check

T = TypeVar("T")

# Between two bursts of different engines: the threads of an engine go on spinning for a while after
# its call, and take the cores from the next one.
PAUSE_S = 0.01


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """The result of one call, and the seconds that it took, in the caller's grad mode."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


@torch.no_grad()
def burst(call: Callable[[], object], seconds: float) -> list[float]:
    """Time calls made back to back, after one that isn't counted.

    The uncounted call brings weights back into the caches, and wakes the threads of an engine,
    after another contender had its turn.

    Args:
        call: what is timed.
        seconds: about how long all counted calls take together; there is one at least.

    Returns:
        The seconds of each counted call.
    """
    timed(call)
    times: list[float] = []
    total = 0.0
    while not times or total < seconds:
        times.append(timed(call)[1])
        total += times[-1]
    return times


@torch.no_grad()
def race(
    calls: Sequence[Callable[[], object]],
    *,
    least: int = 5,
    seconds: float = 0.0,
    burst_s: float = 0.0,
    warm_up: int = 1,
) -> list[float]:
    """Median seconds of each call, taking turns.

    Args:
        calls: the contenders, called without arguments.
        least: how often each is timed at least.
        seconds: turns go on until the counted calls have taken so long per contender, on average.
        burst_s: length of a turn, after a pause and an uncounted call; 0: a turn is one call.
        warm_up: uncounted calls of each before the first turn.

    Raises:
        ValueError: `least` is below 1.
    """
    check.count("least", least)
    for _ in range(warm_up):
        for call in calls:
            timed(call)
    times: list[list[float]] = [[] for _ in calls]
    left, fewest = seconds * len(calls), 0
    while calls and (fewest < least or left > 0):
        for call, taken in zip(calls, times, strict=True):
            turn = _turn(call, burst_s)
            taken += turn
            left -= sum(turn)
        fewest = min(map(len, times))
    return [statistics.median(taken) for taken in times]


def share(call: Callable[[], object], parts: Iterable[nn.Module], *, least: int = 5) -> float:
    """Which share of a call its parts take, in the median of some calls.

    Args:
        call: of a model.
        parts: modules of it, none inside another.
        least: how many calls are timed.
    """
    taken: list[float] = []  # of each part of a call
    begun: list[float] = []

    def begin(_part: nn.Module, _inputs: object) -> None:
        begun.append(time.perf_counter())

    def end(_part: nn.Module, _inputs: object, _output: object) -> None:
        taken.append(time.perf_counter() - begun.pop())

    def once() -> float:
        taken.clear()
        (seconds,) = burst(call, 0.0)
        return sum(taken[len(taken) // 2 :]) / seconds  # the first call isn't counted

    hooks: list[RemovableHandle] = []
    for part in parts:
        hooks += [part.register_forward_pre_hook(begin), part.register_forward_hook(end)]
    try:
        return statistics.median(once() for _ in range(least))
    finally:
        for hook in hooks:
            hook.remove()


def _turn(call: Callable[[], object], burst_s: float) -> list[float]:
    if not burst_s:
        return [timed(call)[1]]
    time.sleep(PAUSE_S)
    return burst(call, burst_s)
