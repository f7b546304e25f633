"""Requests that wait for the same model, run together. Texts that are being written join one
another in `scheduler` instead.

A batch is taken as soon as the model is free, so a lone request never waits for company: what
arrived while the last batch ran is the next one. The oldest request always goes first; beside it go
the next oldest that are about as long, so that little is padded, up to a budget of tokens, padding
included: what the settings allow, and what takes BATCH_S at the pace of the batches before, or,
where much more waits, a PART of it. Larger batches would answer hardly more per second, and
everyone later.

One model call of a process runs at a time: PyTorch has its own threads below it, and two callers
at once would only take each other's cores. Calls run in one thread, `compute`. Batches of a model
whose calls are short run in the event loop itself, which they hold up for SOON_S at most: there the
model and HTTP don't contend for Python's lock, nothing is handed over, and no team of threads waits
for the one whose core another process took. libgomp keeps a team for each thread that ever had
others below it, and once its threads are more than the cores it puts all of them to sleep at every
barrier (GOMP_SPINCOUNT no longer counts), which made a model of 8 ms take 16. So the event loop has
a team only where all models are short, and until `compute` has had one.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from quantize.clock import timed
from quantize.run.serve.errors import Refused, busy
from quantize.run.serve.settings import Settings

T = TypeVar("T")
LOG = logging.getLogger("quantize.serve")
MOST_ROWS = 256
BATCH_S = 0.1
PART = 0.25  # of all that waits: a batch has as much at least, however long it takes
LONG_S = 0.004  # a call beside which HTTP costs little; shorter ones are short
SOON_S = 0.02  # the event loop may be held up for so long
PASSES = 8  # of the event loop, in which what has come reaches the batcher
SPREAD, NEAR = 1.15, 2  # the longest of a batch has at most SPREAD x shortest + NEAR tokens
SHARE = 0.2  # of the last batch in the pace


@dataclass(eq=False)
class Job:
    """Rows of one request that go through a model together.

    Args:
        content: what the model's `run` takes.
        rows: how many.
        length: tokens of each, padding included.
        key: jobs of different keys never share a batch.
    """

    content: Any
    rows: int
    length: int
    key: Hashable = None
    done: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())


def choose(waiting: Sequence[Job], most_tokens: int) -> list[Job]:
    """The oldest job and the next oldest that fit beside it, shortest first.

    Args:
        waiting: oldest first, at least one.
        most_tokens: rows x longest length of the batch.
    """
    chosen = [waiting[0]]
    rows, shortest, longest = waiting[0].rows, waiting[0].length, waiting[0].length
    for job in waiting[1:]:
        low, high = min(shortest, job.length), max(longest, job.length)
        if job.key != waiting[0].key or high > SPREAD * low + NEAR:
            continue
        rows += job.rows
        if rows * high > most_tokens or rows > MOST_ROWS:
            break
        chosen.append(job)
        shortest, longest = low, high
    return sorted(chosen, key=lambda job: job.length)


class Batcher:
    """The queue of one model.

    Args:
        run: what each of a list of jobs gives, in their order.
        compute: where model calls run.
        settings: budget and bound of the queue.
        seen: told the rows of each batch, and how many jobs wait.
        threads: how many of torch the next batch may have; None: as many as `compute` says.
        short: whether the next batch may run in the event loop.
    """

    def __init__(
        self,
        run: Callable[[list[Job]], Sequence[Any]],
        compute: Compute,
        settings: Settings,
        seen: Callable[[int, int], None] = lambda rows, waiting: None,
        threads: Callable[[], int] | None = None,
        short: Callable[[], bool] = lambda: True,
    ) -> None:
        self.run, self.compute, self.settings, self.seen = run, compute, settings, seen
        self._threads, self._short = threads or (lambda: compute.threads), short
        self.waiting: list[Job] = []
        self._pace = math.inf  # tokens per second
        self._runner: asyncio.Task | None = None

    async def submit(self, jobs: Sequence[Job]) -> list[Any]:
        """The results of a request's jobs. Raises Refused for a full queue or a failed job."""
        if len(self.waiting) >= self.settings.max_queue:
            raise busy(len(self.waiting))
        for job in jobs:
            self._check_size(job)
        self.waiting += jobs
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._work())
        try:
            if len(jobs) == 1:
                return [await jobs[0].done]
            return await asyncio.gather(*(job.done for job in jobs))
        except BaseException:
            for job in jobs:
                job.done.cancel()
            raise

    def _check_size(self, job: Job) -> None:
        most = self.settings.max_batch_tokens
        if job.rows * job.length > most or job.rows > MOST_ROWS:
            raise Refused(
                f"{job.rows} rows of {job.length} tokens in one request; allowed: {most} tokens "
                f"and {MOST_ROWS} rows"
            )

    async def _work(self) -> None:
        while self.waiting:
            self.waiting = [job for job in self.waiting if not job.done.done()]
            if not self.waiting:
                break
            short = self._short() and not self.compute.busy
            jobs = choose(self.waiting, self._budget(SOON_S if short else BATCH_S))
            taken = set(map(id, jobs))
            self.waiting = [job for job in self.waiting if id(job) not in taken]
            self.seen(sum(job.rows for job in jobs), len(self.waiting))
            call = partial(self._results, jobs)
            if short and self._seconds(jobs) <= SOON_S:
                results = self.compute.run_here(call, self._threads())
            else:
                results = await self.compute.run(call, self._threads())
            for job, result in zip(jobs, results, strict=True):
                self._finish(job, result)
            for _ in range(PASSES):
                await asyncio.sleep(0)  # these are answered, and others come in
        self.seen(0, 0)

    def _budget(self, seconds: float) -> int:
        """Tokens of the next batch. The first is the oldest job alone: it tells the pace."""
        if not math.isfinite(self._pace):
            return 1
        waiting = sum(job.rows * job.length for job in self.waiting)
        wanted = max(1.0, self._pace * seconds, PART * waiting)
        return int(min(self.settings.max_batch_tokens, wanted))

    def _seconds(self, jobs: Sequence[Job]) -> float:
        """What a batch will take: at the pace of those before, or of the slowest short calls."""
        if math.isfinite(self._pace):
            return _tokens(jobs) / self._pace
        return LONG_S * sum(job.rows for job in jobs)

    def _note_pace(self, jobs: Sequence[Job], seconds: float) -> None:
        pace = _tokens(jobs) / max(seconds, 1e-6)
        known = math.isfinite(self._pace)
        self._pace = self._pace + SHARE * (pace - self._pace) if known else pace

    @staticmethod
    def _finish(job: Job, result: Any) -> None:
        if job.done.done():  # its client has gone
            return
        if isinstance(result, Exception):
            job.done.set_exception(result)
        else:
            job.done.set_result(result)

    def _results(self, jobs: list[Job]) -> Sequence[Any]:
        """One result or exception per job; where a batch fails, each is run by itself."""
        try:
            results, seconds = timed(lambda: self.run(jobs))
        except Exception as error:
            if len(jobs) > 1:
                return [self._results([job])[0] for job in jobs]
            return [error if isinstance(error, Refused) else failed(error)]
        self._note_pace(jobs, seconds)
        return results


def _tokens(jobs: Sequence[Job]) -> int:
    """Tokens of a batch, padding included."""
    return sum(job.rows for job in jobs) * max(job.length for job in jobs)


class Compute:
    """The thread of model calls.

    Args:
        threads: of torch, for calls that don't say how many they may have.
        all_short: whether calls are expected to run in the event loop.
    """

    def __init__(self, threads: int = 1, *, all_short: bool = False) -> None:
        self.threads = threads
        self.team_here = all_short  # whether calls in the event loop may have several threads
        self._executor = ThreadPoolExecutor(1, "compute")
        self._calls = 0

    @property
    def busy(self) -> bool:
        """Whether a call is under way or waits."""
        return self._calls > 0

    async def run(self, call: Callable[[], T], threads: int | None = None) -> T:
        """What a call gives, on so many threads of torch."""
        threads = threads or self.threads
        self.team_here &= threads == 1
        work = partial(_on_threads, threads, call)
        self._calls += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        finally:
            self._calls -= 1

    def run_here(self, call: Callable[[], T], threads: int) -> T:
        """What a call gives that runs in the event loop, on so many threads if it may have them."""
        return _on_threads(threads if self.team_here else 1, call)

    def shutdown(self) -> None:
        """Wait for the call under way; no other follows."""
        self._executor.shutdown()


def _on_threads(threads: int, call: Callable[[], T]) -> T:
    if torch.get_num_threads() != threads:  # to set them takes long, even to what they are
        torch.set_num_threads(threads)
    return call()


def failed(error: Exception) -> Refused:
    """What the sender learns of an exception: its kind. The log has the rest."""
    LOG.error("a request failed", exc_info=error)
    return Refused(f"the model failed with {type(error).__name__}", status=500)
