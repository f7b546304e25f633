"""Measuring in tests: one Python that forks for many comparisons, and few calls where a user's run
times many.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from quantize import clock
from quantize.measuring.nursery import Nursery
from quantize.measuring.turns import take_turns


class Nurseries(ExitStack):
    """Stands for `Nursery`: one for each count of threads and working folder, until the end."""

    def __init__(self) -> None:
        super().__init__()
        self.started: dict[tuple[int, Path], Nursery] = {}

    def __call__(
        self, *, threads: int, modules: Sequence[str] = ()
    ) -> AbstractContextManager[Nursery]:
        if not hasattr(os, "fork"):
            return Nursery(threads=threads)
        key = threads, Path.cwd()
        if key not in self.started:
            self.started[key] = self.enter_context(Nursery(threads=threads))
        return nullcontext(self.started[key])

    def are_reaped(self) -> bool:
        """Whether all that forked something have ended and were waited for."""
        processes = [nursery._process for nursery in self.started.values()]
        return all(process is None or process.returncode is not None for process in processes)


def time_briefly(patch: pytest.MonkeyPatch) -> None:
    """Let comparisons time one call of each artifact, and races one turn, after a call that isn't
    counted: the first one of an int8 layer tries kernels.
    """

    def one_round(turns: Any, rounds: int, burst_s: float, *rest: Any, **options: Any) -> Any:
        return take_turns(turns, 1, 0.0, *rest, **options)

    once = partial(clock.race, least=1)
    patch.setattr("quantize.measuring.comparison.take_turns", one_round)
    patch.setattr("quantize.clock.race", lambda calls, **_: once(calls))
