"""Measuring in tests: one Python that forks for many comparisons, and few calls where a user's run
times many.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantize import clock
from quantize.compression.low_rank import timing
from quantize.jobs.presets import PRESETS
from quantize.measuring.nursery import Nursery
from quantize.measuring.turns import take_turns
from quantize.nn import int8_kernels


class Nurseries(ExitStack):
    """Stands for `Nursery`: one for each count of threads and working folder, until the end, that
    has imported what is asked for of packages other than torch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.started: list[tuple[Path, Nursery]] = []

    def __call__(
        self, *, threads: int, modules: Sequence[str] = ()
    ) -> AbstractContextManager[Nursery]:
        if not hasattr(os, "fork"):
            return Nursery(threads=threads)
        wanted = {name for name in modules if not name.startswith("torch.")}
        for folder, nursery in self.started:
            alike = (folder, nursery.threads) == (Path.cwd(), threads)
            if alike and wanted <= set(nursery.modules):
                return nullcontext(nursery)
        nursery = self.enter_context(Nursery(threads=threads, modules=modules))
        self.started.append((Path.cwd(), nursery))
        return nullcontext(nursery)

    def are_reaped(self) -> bool:
        """Whether all that forked something have ended and were waited for."""
        processes = [nursery._process for _, nursery in self.started]
        return all(process is None or process.returncode is not None for process in processes)


def choose_without_a_clock() -> None:
    """Let the kernels of int8 layers, which all give the same bits, race once for each shape: there
    are thousands of shapes in these tests. No layer takes long enough for its low-rank pair to be
    timed: ranks are the same on every machine, however busy it is.
    """
    once = partial(clock.race, least=1)
    int8_kernels.clock = SimpleNamespace(race=lambda calls, **_: once(calls))
    timing.LONG_ENOUGH = math.inf


def rewrite_most(patch: pytest.MonkeyPatch) -> None:
    """Let fusion take the most rewritten of its ways, and kernels for layers of any size."""

    def last_wins(models: dict[str, Callable[..., Any]], inputs: Any, **_: Any) -> dict[str, float]:
        return {name: float(len(models) - i) for i, name in enumerate(models)}

    for module in ("planning", "fusing"):
        patch.setattr(f"quantize.run.fusion.{module}.race", last_wins)
    as_fast = {"fused": 1.0, "model": 1.0}
    patch.setattr("quantize.run.fusion.fusing._times", lambda *_: as_fast)
    patch.setattr("quantize.run.fusion.kernels.SMALL", 0)


def train_briefly(patch: pytest.MonkeyPatch) -> None:
    """Let the tiny text preset see short texts, and the scripts time each file once."""
    tiny = PRESETS["text"]["tiny"]
    recipe = replace(tiny.training, steps=2, length=32)
    short = replace(tiny, training=recipe, batch=(2, 32), validation=512)
    patch.setitem(PRESETS["text"], "tiny", short)
    time_briefly(patch)


def time_briefly(patch: pytest.MonkeyPatch) -> None:
    """Let comparisons time one call of each artifact, and races one turn, after a call that isn't
    counted: the first one of an int8 layer tries kernels.
    """

    def one_round(turns: Any, rounds: int, burst_s: float, *rest: Any, **options: Any) -> Any:
        return take_turns(turns, 1, 0.0, *rest, **options)

    once = partial(clock.race, least=1)
    patch.setattr("quantize.measuring.comparison.take_turns", one_round)
    patch.setattr("quantize.clock.race", lambda calls, **_: once(calls))
