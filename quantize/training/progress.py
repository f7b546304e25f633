"""Where training stands, and how people see it."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID
from rich.progress import Progress as RichProgress

_EVERY_S = 10.0  # between two lines, where there is no terminal


@dataclass(frozen=True)
class Progress:
    """Where training stands, for `on_progress`."""

    step: int  # steps done
    steps: int
    loss: float  # mean of the batch, nats; over all ranks
    units_per_s: float  # tokens (integer inputs) or samples per second, over all ranks
    seconds_left: float


class ProgressPrinter:
    """`on_progress` for people, as a context: a bar on a terminal, else a plain line now and
    then.
    """

    def __init__(self, name: str = "train", unit: str = "tokens", stream: TextIO | None = None):
        self.name, self.unit = name, unit
        self.console = Console(file=stream or sys.stderr)
        self.bar = RichProgress(
            *("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[status]}"),
            console=self.console,
        )
        self._task: TaskID | None = None
        self._shown = -math.inf

    def __enter__(self) -> ProgressPrinter:
        return self

    def __exit__(self, *_error: object) -> None:
        self.bar.stop()

    def __call__(self, at: Progress) -> None:
        # a good student's is 0.000432
        loss = f"{at.loss:.3f}" if at.loss >= 0.1 else f"{at.loss:.3g}"
        status = f"loss {loss}  {at.units_per_s:,.0f} {self.unit}/s  {at.seconds_left:.0f} s left"
        now = time.monotonic()
        if self.console.is_terminal:
            if self._task is None:
                self.bar.start()
                self._task = self.bar.add_task(self.name, total=at.steps, status=status)
            self.bar.update(self._task, completed=at.step, status=status)
        elif now - self._shown >= _EVERY_S or at.step == at.steps:
            self._shown = now
            self.console.print(
                f"{self.name}: step {at.step}/{at.steps}  {status}", highlight=False, soft_wrap=True
            )
