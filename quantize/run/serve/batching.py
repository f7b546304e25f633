"""Requests that wait for the same model, run together. Texts that are being written join one
another in `scheduler` instead.

A batch is taken as soon as the model is free, so a lone request never waits for company: what
arrived while the last batch ran is the next one. The oldest request always goes first; beside it go
those of the next oldest whose lengths are nearest, so that little is padded, up to a budget of
tokens, padding included: what the settings allow, and what takes BATCH_S at the pace of the batches
before, or, where much more waits, a PART of it. Larger batches would answer hardly more per second,
and everyone later.

One model call of a process runs at a time: PyTorch has its own threads below it, and two callers
at once would only take each other's cores. Calls run in one thread, `compute`, but a batch that is
soon done runs in the event loop itself, where it is ready earlier: to hand it over and back takes
as long as a small model. It computes alone there: libgomp keeps a team for each thread that ever
had others below it, and once its threads are more than the cores it puts all of them to sleep at
every barrier (GOMP_SPINCOUNT no longer counts), which made a model of 8 ms take 16.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
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
SOON_S = 0.002  # the event loop may be held up for so long
WINDOW = 4  # budgets of the oldest tokens, from which a batch is chosen: nobody is left far behind
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
    """The oldest job and those that fit beside it, shortest first.

    Args:
        waiting: oldest first, at least one.
        most_tokens: rows x longest length of the batch.
    """
    oldest = waiting[0]
    alike = [job for job in waiting if job.key == oldest.key]
    counts = accumulate(job.rows * job.length for job in alike)
    most_seen = WINDOW * most_tokens
    seen = [job for job, count in zip(alike, counts, strict=True) if count <= most_seen]
    others = [job for job in seen if job is not oldest]
    others.sort(key=lambda job: abs(job.length - oldest.length))
    chosen, rows, longest = [oldest], oldest.rows, oldest.length
    for job in others:
        rows += job.rows
        longest = max(longest, job.length)
        if rows * longest > most_tokens or rows > MOST_ROWS:
            break
        chosen.append(job)
    return sorted(chosen, key=lambda job: job.length)


class Batcher:
    """The queue of one model.

    Args:
        run: what each of a list of jobs gives, in their order.
        compute: where model calls run.
        settings: budget and bound of the queue.
        seen: told the rows of each batch, and how many jobs wait.
        threads: how many of torch the next batch may have; None: as many as `compute` says.
    """

    def __init__(
        self,
        run: Callable[[list[Job]], Sequence[Any]],
        compute: Compute,
        settings: Settings,
        seen: Callable[[int, int], None] = lambda rows, waiting: None,
        threads: Callable[[], int] | None = None,
    ) -> None:
        self.run, self.compute, self.settings, self.seen = run, compute, settings, seen
        self._threads = threads or (lambda: compute.threads)
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
            jobs = choose(self.waiting, self._budget())
            taken = set(map(id, jobs))
            self.waiting = [job for job in self.waiting if id(job) not in taken]
            self.seen(sum(job.rows for job in jobs), len(self.waiting))
            if self._seconds(jobs) <= SOON_S and not self.compute.busy:
                results = self._results(jobs)
            else:
                call = partial(self._results, jobs)
                results = await self.compute.run(call, self._threads())
            for job, result in zip(jobs, results, strict=True):
                self._finish(job, result)
            await asyncio.sleep(0)  # these are answered, and others come in
        self.seen(0, 0)

    def _budget(self) -> int:
        """Tokens of the next batch."""
        waiting = sum(job.rows * job.length for job in self.waiting)
        wanted = max(1.0, self._pace * BATCH_S, PART * waiting)
        return int(min(self.settings.max_batch_tokens, wanted))

    def _seconds(self, jobs: Sequence[Job]) -> float:
        """What a batch will take, at the pace of those before."""
        return _tokens(jobs) / self._pace if math.isfinite(self._pace) else math.inf

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
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._executor = ThreadPoolExecutor(1, "compute")
        self._calls = 0

    @property
    def busy(self) -> bool:
        """Whether a call is under way or waits."""
        return self._calls > 0

    async def run(self, call: Callable[[], T], threads: int | None = None) -> T:
        """What a call gives, on so many threads of torch."""
        work = partial(_on_threads, threads or self.threads, call)
        self._calls += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        finally:
            self._calls -= 1

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
