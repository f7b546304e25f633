"""What a server holds while it runs: its models, a queue for each, its numbers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.requests import Request

from quantize.host import default_threads
from quantize.run.serve.batching import Batcher, Compute, Job
from quantize.run.serve.errors import Refused, busy
from quantize.run.serve.exchange import Gone, parse_json, read_body
from quantize.run.serve.fields import Fields
from quantize.run.serve.keeping import Keeper
from quantize.run.serve.metrics import Metrics
from quantize.run.serve.prefixes import Prefixes
from quantize.run.serve.scheduler import Scheduler
from quantize.run.serve.served import Served
from quantize.run.serve.settings import Settings


class Running:
    """A served model with its queues.

    Args:
        served: the model.
        state: of the server.
    """

    def __init__(self, served: Served, state: State) -> None:
        self.served, self.name = served, served.name
        self.created = int(time.time())
        compute, settings = state.compute, state.settings
        self._metrics, self._state = state.metrics, state
        self.prefixes = Prefixes(settings.prefix_bytes)
        self.tensors = self.encoder = self.scheduler = None
        if served.tensors is not None:
            self.tensors = self._batcher(served.tensors.run)
        if served.encoder is not None:
            self.encoder = self._batcher(served.encoder.run)
        if served.decoder is not None:
            writer = served.decoder.writer
            self.scheduler = Scheduler(writer, compute, settings, self._seen)

    def check_room(self) -> None:
        """Raises Refused if too many texts wait: before an answer begins that couldn't say so."""
        if self.scheduler is not None and self.scheduler.full:
            raise busy(len(self.scheduler.waiting))

    def _batcher(self, run: Callable[[list[Job]], Sequence[Any]]) -> Batcher:
        state = self._state
        threads, short = state.batch_threads, self._is_short
        return Batcher(run, state.compute, state.settings, self._seen, threads, short)

    def _is_short(self) -> bool:
        """Whether calls are short on one thread, and others would help little or aren't free."""
        if not self.served.is_short:
            return False
        if self._state.compute.team_here or self._state.batch_threads() == 1:
            return True
        return not self.served.gains()

    def _seen(self, rows: int, waiting: int) -> None:
        self._metrics.computes(rows > 0)
        self._metrics.put("quantize_waiting", self.name, waiting)
        self._metrics.put("quantize_active", self.name, rows)
        if rows:
            self._metrics.observe("quantize_batch_rows", self.name, rows)


class State:
    """One per process.

    Args:
        models: those that are served.
        settings: the limits.
        metrics: the numbers; workers that were forked share them.
        keeper: of the connections to which texts are written.
    """

    def __init__(
        self, models: Sequence[Served], settings: Settings, metrics: Metrics, keeper: Keeper
    ) -> None:
        self.settings, self.metrics, self.keeper = settings, metrics, keeper
        self.cores = default_threads()
        self.text_threads = settings.threads or max(1, self.cores // settings.workers)
        all_short = all(served.is_short for served in models)
        self.compute = Compute(self.text_threads, all_short=all_short)
        self.models = {served.name: Running(served, self) for served in models}
        self.draining = False

    def batch_threads(self) -> int:
        """Threads of a batch: workers that computed lately share the cores."""
        return self.settings.threads or max(1, self.cores // max(1, self.metrics.busy()))

    def find(self, name: object, status: int = 404) -> Running:
        """The model of a name. Raises Refused for one that isn't served."""
        if isinstance(name, str) and name in self.models:
            return self.models[name]
        given = name if isinstance(name, str) and len(name) <= 80 else type(name).__name__
        allowed = ", ".join(self.models)
        raise Refused(f"no model {given!r}; allowed: {allowed}", status=status, field="model")


class Count:
    """Counts one request of a model and measures it, as a context around its work.

    Args:
        state: of the server.
        model: the one that was asked.
    """

    def __init__(self, state: State, model: Running) -> None:
        self._metrics, self._name = state.metrics, model.name
        self._started, self._wrote = time.monotonic(), False

    def __enter__(self) -> Count:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._metrics.add(_counter(error), self._name)
        if error is None:
            self._observe("quantize_request_seconds")

    @contextmanager
    def mistakes(self) -> Iterator[None]:
        """Count the request only if it is refused here."""
        try:
            yield
        except Refused as refused:
            self._metrics.add(_counter(refused), self._name)
            raise

    def first_token(self) -> None:
        """A token has come; the first one is measured."""
        if not self._wrote:
            self._wrote = True
            self._observe("quantize_first_token_seconds")

    def tokens(self, read: int, written: int) -> None:
        """Count tokens."""
        self._metrics.add("quantize_prompt_tokens_total", self._name, read)
        self._metrics.add("quantize_generated_tokens_total", self._name, written)

    def _observe(self, metric: str) -> None:
        self._metrics.observe(metric, self._name, time.monotonic() - self._started)


def _counter(error: BaseException | None) -> str:
    """The counter of what a request came to."""
    if error is None:
        return "quantize_answers_total"
    if isinstance(error, (Gone, asyncio.CancelledError, GeneratorExit)):
        return "quantize_cancelled_total"
    status = error.status if isinstance(error, Refused) else 500
    if status == 503:
        return "quantize_refusals_total"
    return "quantize_mistakes_total" if status < 500 else "quantize_failures_total"


def of(request: Request) -> State:
    """The state of the server that a request came to."""
    return request.app.state.serving


async def read(request: Request) -> tuple[State, Fields, Running]:
    """The server that a request came to, the fields of its JSON, and the model that it names."""
    serving = of(request)
    fields = Fields(parse_json(await read_body(request, serving.settings.max_body)))
    return serving, fields, serving.find(fields.take("model"))
