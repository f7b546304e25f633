"""Texts of one model, written together: continuous batching.

Between two steps texts join and leave. A step reads at most CHUNK tokens of prompts, so that a long
prompt doesn't hold up the others for longer, and then one token of every text that is being
written: those in caches of ours as one pass of native code (`decoding.together`), in which each
gets the bits that it gets alone; others, one after the other.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from quantize.models import DecoderLM
from quantize.run.decoding.native import MOST_ROWS, Step
from quantize.run.decoding.passes import NativePasses
from quantize.run.decoding.recognition import obstacle
from quantize.run.decoding.together import read_together
from quantize.run.generate.reader import CHUNK
from quantize.run.serve.batching import PASSES, Compute, failed
from quantize.run.serve.errors import Refused, busy
from quantize.run.serve.sequence import Sequence, Token
from quantize.run.serve.settings import Settings

LOG = logging.getLogger("quantize.serve")
Event = Token | Refused
Events = asyncio.Queue[tuple[int, Event]]


class Writer:
    """Steps of several texts; no queue and no event loop, so that it runs in any thread.

    `reason` says why texts are read one after the other, or is None.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        is_ours = isinstance(model, DecoderLM)
        self.reason = obstacle(model) if is_ours else f"{type(model).__name__} isn't a DecoderLM"
        if self.reason is not None:
            LOG.warning("texts are written one after the other: %s", " ".join(self.reason.split()))
        self._step = Step(model, narrow=False) if is_ours and not self.reason else None
        self.passes = NativePasses(model) if isinstance(model, DecoderLM) else None

    def step(self, texts: list[Sequence]) -> list[tuple[Sequence, Event]]:
        """Go on with each text; what came of it, for those that got a token or failed."""
        writing = [text for text in texts if not text.reading]
        events = self._read_prompts([text for text in texts if text.reading])
        events += self._read_tokens(writing)
        return events

    def _read_prompts(self, texts: list[Sequence]) -> list[tuple[Sequence, Event]]:
        events: list[tuple[Sequence, Event]] = []
        left = CHUNK
        for text in texts:
            try:
                while left > 0 and text.reading:
                    left -= text.read_piece()
                if not text.reading:
                    events.append((text, text.first_token()))
            except Exception as error:
                events.append((text, failed(error)))
        return events

    def _read_tokens(self, texts: list[Sequence]) -> list[tuple[Sequence, Event]]:
        events: list[tuple[Sequence, Event]] = []
        for group in self._groups(texts):
            for text, logits in self._logits(group):
                try:
                    event = text.take(logits) if isinstance(logits, Tensor) else logits
                except Exception as error:  # logits that aren't finite
                    event = failed(error)
                events.append((text, event))
        return events

    def _groups(self, texts: list[Sequence]) -> Iterator[list[Sequence]]:
        """Texts whose caches can be read by one pass."""
        by_dtype: dict[torch.dtype | None, list[Sequence]] = {}
        for text in texts:
            dtype = text.cache.dtype if text.cache is not None else None
            by_dtype.setdefault(dtype, []).append(text)
        for alike in by_dtype.values():
            for start in range(0, len(alike), MOST_ROWS):
                yield alike[start : start + MOST_ROWS]

    def _logits(self, texts: list[Sequence]) -> list[tuple[Sequence, Tensor | Refused]]:
        caches = [text.cache for text in texts]
        together = None
        if self._step is not None:
            tokens = torch.cat([text.ids[0, -1:] for text in texts])
            known = [cache for cache in caches if cache is not None]
            if len(known) == len(caches):
                together = read_together(self._step, tokens, known)
        if together is not None:
            return list(zip(texts, together.split(1), strict=True))
        return [(text, _alone(text)) for text in texts]


def _alone(text: Sequence) -> Tensor | Refused:
    try:
        return text.read_token()
    except Exception as error:
        return failed(error)


class Scheduler:
    """The queue of a decoder and the loop that serves it.

    Args:
        writer: of the model.
        compute: where model calls run.
        settings: how many texts are written at a time, how many wait.
        seen: told how many texts are written in a step, and how many wait.
    """

    def __init__(
        self,
        writer: Writer,
        compute: Compute,
        settings: Settings,
        seen: Callable[[int, int], None] = lambda active, waiting: None,
    ) -> None:
        self.writer, self.compute, self.settings, self.seen = writer, compute, settings, seen
        self.waiting: deque[Sequence] = deque()
        self.active: list[Sequence] = []
        self._events: dict[Sequence, tuple[Events, int]] = {}
        self._runner: asyncio.Task | None = None

    @property
    def full(self) -> bool:
        """Whether no more may wait."""
        return len(self.waiting) >= self.settings.max_queue

    def submit(self, texts: list[Sequence]) -> Events:
        """Queue the texts of one request.

        Returns:
            A queue of their tokens, each with the index of its text; a text's last one has `last`,
            or is a Refused.

        Raises:
            Refused: too many wait already.
        """
        if self.full:
            raise busy(len(self.waiting))
        events: Events = asyncio.Queue()
        for index, text in enumerate(texts):
            self._events[text] = events, index
        self.waiting += texts
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._work())
        return events

    def cancel(self, texts: list[Sequence]) -> None:
        """Stop writing texts: their client has gone, or has all that it wanted."""
        for text in texts:
            text.cancelled = True
            self._events.pop(text, None)

    async def _work(self) -> None:
        while self._admit():
            self.seen(len(self.active), len(self.waiting))
            active = list(self.active)
            events: list[tuple[Sequence, Event]]
            try:
                events = await self.compute.run(partial(self.writer.step, active))
            except Exception as error:  # a pass failed as a whole
                events = [(text, failed(error)) for text in active]
            self._deliver(events)
            for _ in range(PASSES):
                await asyncio.sleep(0)  # tokens go out before the next pass takes all cores
        self.seen(0, 0)

    def _admit(self) -> bool:
        """Let the next texts in; whether there is anything to do."""
        self.active = [text for text in self.active if not text.cancelled]
        while self.waiting and len(self.active) < self.settings.most_active:
            text = self.waiting.popleft()
            if not text.cancelled:
                self.active.append(text)
        return bool(self.active)

    def _deliver(self, events: list[tuple[Sequence, Event]]) -> None:
        for text, event in events:
            if text in self._events:
                queue, index = self._events[text]
                queue.put_nowait((index, event))
            if isinstance(event, Refused) or event.last is not None:
                text.cancelled = True
                self._events.pop(text, None)
