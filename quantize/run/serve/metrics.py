"""Counters of a server in the text format of Prometheus, one sum over all its worker processes.

Every worker has a row of numbers in memory that they share, made before they are forked; it writes
its own row and reads all of them, so no answer depends on which worker was asked.
"""

from __future__ import annotations

import math
import mmap
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
RECENT_S = 0.1  # a worker that computed so lately will soon do so again
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
HISTOGRAMS = {
    "quantize_request_seconds": ("Seconds from a request to the end of its answer", SECONDS),
    "quantize_first_token_seconds": ("Seconds from a request to its first token", SECONDS),
    "quantize_batch_rows": ("Rows of a call of the model", ROWS),
}
COUNTERS = {
    "quantize_answers_total": "Requests that were answered",
    "quantize_mistakes_total": "Requests that were refused as wrong (4xx)",
    "quantize_refusals_total": "Requests that were refused because too many waited (503)",
    "quantize_failures_total": "Requests that failed (other 5xx)",
    "quantize_cancelled_total": "Requests whose client went before the end",
    "quantize_prompt_tokens_total": "Tokens that were read",
    "quantize_generated_tokens_total": "Tokens that were written",
}
GAUGES = {
    "quantize_waiting": "Requests that wait",
    "quantize_active": "Rows or texts in the model's call under way",
}


class Metrics:
    """Numbers by metric and model.

    Args:
        models: their names.
        workers: rows; `row` is this process's.
    """

    def __init__(self, models: Sequence[str], workers: int = 1) -> None:
        self.models, self.row = list(models), 0
        self._places: dict[tuple[str, str], int] = {}
        size = 0
        for model in self.models:
            for name in (*COUNTERS, *GAUGES):
                self._places[name, model] = size
                size += 1
            for name, (_, bounds) in HISTOGRAMS.items():
                self._places[name, model] = size
                size += len(bounds) + 2  # a count for each bound and above, and the sum
        self._computed = size  # when it did last, on the clock of all processes
        self._connections, size = size + 1, size + 2
        shared = mmap.mmap(-1, max(1, workers * size * 8))
        self._numbers = np.frombuffer(shared, dtype=np.float64).reshape(workers, size)
        self._numbers[:, self._computed] = -math.inf
        self._numbers[:, self._connections] = math.inf

    def add(self, name: str, model: str, value: float = 1) -> None:
        """Count."""
        self._numbers[self.row, self._places[name, model]] += value

    def put(self, name: str, model: str, value: float) -> None:
        """Set a gauge of this worker."""
        self._numbers[self.row, self._places[name, model]] = value

    def observe(self, name: str, model: str, value: float) -> None:
        """Put a value into a histogram."""
        place, bounds = self._places[name, model], HISTOGRAMS[name][1]
        numbers = self._numbers[self.row]
        numbers[place + bisect_left(bounds, value)] += 1
        numbers[place + len(bounds) + 1] += value

    def take_row(self, row: int) -> None:
        """Write into this row from now on."""
        self.row = row
        self.forget(row)

    def forget(self, row: int) -> None:
        """A worker has ended: its gauges are nothing, it computes no more, and accepts nothing."""
        for (name, _), place in self._places.items():
            if name in GAUGES:
                self._numbers[row, place] = 0
        self._numbers[row, self._computed] = -math.inf
        self._numbers[row, self._connections] = math.inf

    def connected(self, count: float) -> None:
        """This worker's connections; infinite: it takes no more."""
        self._numbers[self.row, self._connections] = count

    def fewest_connections(self) -> float:
        """Those of the worker that has the fewest."""
        return float(self._numbers[:, self._connections].min())

    def computes(self, now: bool) -> None:
        """Whether this worker computes from now on."""
        self._numbers[self.row, self._computed] = math.inf if now else time.monotonic()

    def busy(self) -> int:
        """Workers that compute, or did within the last RECENT_S."""
        return int((self._numbers[:, self._computed] > time.monotonic() - RECENT_S).sum())

    def text(self) -> str:
        """All metrics, of all workers."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        sums = self._numbers.sum(0).tolist()
        for kind, table in (("counter", COUNTERS), ("gauge", GAUGES)):
            for name, text in table.items():
                yield f"# HELP {name} {text}."
                yield f"# TYPE {name} {kind}"
                for model in self.models:
                    yield f'{name}{{model="{model}"}} {sums[self._places[name, model]]!r}'
        for name, (text, bounds) in HISTOGRAMS.items():
            yield f"# HELP {name} {text}."
            yield f"# TYPE {name} histogram"
            for model in self.models:
                place = self._places[name, model]
                yield from _histogram(name, model, bounds, sums[place:])


def _histogram(
    name: str, model: str, bounds: Sequence[float], numbers: Sequence[float]
) -> Iterator[str]:
    total = 0.0
    for bound, count in zip((*bounds, "+Inf"), numbers, strict=False):
        total += count
        yield f'{name}_bucket{{model="{model}",le="{bound}"}} {total!r}'
    yield f'{name}_sum{{model="{model}"}} {numbers[len(bounds) + 1]!r}'
    yield f'{name}_count{{model="{model}"}} {total!r}'
