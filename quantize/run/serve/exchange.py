"""What every route does with HTTP: bodies within a limit, JSON without surprises, answers that end
when their client goes, server-sent events.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quantize.run.serve.errors import Refused

T = TypeVar("T")

JSON = "application/json"
WATCH_AFTER_S = 0.05  # only after so long is it worth a task to see whether a client has gone


class Gone(Exception):
    """The client has closed its connection; there is nobody to answer."""


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request. Raises Refused beyond `most` bytes, Gone if it doesn't all come."""
    claimed = request.headers.get("content-length", "0")
    if claimed.isdigit() and int(claimed) > most:
        raise _too_large(int(claimed), most)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refused("Content-Encoding isn't supported: send the body as it is", status=415)
    parts, size, more = [], 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Gone
        part = message.get("body", b"")
        parts.append(part)
        size += len(part)
        if size > most:
            raise _too_large(size, most)
        more = message.get("more_body", False)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_large(size: int, most: int) -> Refused:
    return Refused(f"a body of at least {size} bytes; allowed: {most}", status=413)


def parse_json(body: bytes | memoryview) -> dict[str, Any]:
    """The object in a body. Raises Refused for what isn't one, for NaN, for a key twice, and for
    half of a surrogate pair, which no answer could repeat.
    """
    data = bytes(body)
    try:
        content = _DECODER.decode(data.decode())
        if b"\\u" in data:
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise Refused("the body isn't JSON: it is nested too deeply") from None
    except ValueError as error:
        reason = "not UTF-8" if isinstance(error, UnicodeError) else str(error)
        raise Refused(f"the body isn't JSON: {reason}") from None
    if not isinstance(content, dict):
        raise Refused("the body must be a JSON object")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands there twice")
    return content


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_unique)


def to_json(content: object) -> bytes:
    """JSON as short as it gets; arrays of numpy are lists, NaN and infinity are null."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def answer(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer in JSON."""
    return Response(to_json(content), status, headers, media_type=JSON)


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives; it is cancelled, and Gone raised, when it takes longer than WATCH_AFTER_S
    and the client goes.
    """
    task, gone = asyncio.current_task(), False
    watcher: asyncio.Task | None = None

    async def watch() -> None:
        nonlocal gone
        await _disconnected(request.receive)
        gone = True
        if task is not None:
            task.cancel()

    def begin() -> None:
        nonlocal watcher
        watcher = asyncio.create_task(watch())

    start = asyncio.get_running_loop().call_later(WATCH_AFTER_S, begin)
    try:
        return await work
    except asyncio.CancelledError:
        if not gone or task is None:
            raise
        task.uncancel()
        raise Gone from None
    finally:
        start.cancel()
        if watcher is not None:
            watcher.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Events(Response):
    """Server-sent events, each an object in JSON.

    Where the client goes, `events` is closed, so that what it runs is stopped.

    Args:
        events: the objects.
        kept: entered while they are sent, behind the head of the answer.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[object], kept: AbstractContextManager) -> None:
        super().__init__(b"", 200, {"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self.events, self.kept = events, kept

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        await asyncio.sleep(0)  # it has gone out
        writer = asyncio.ensure_future(self._write(send))
        watch = asyncio.ensure_future(_disconnected(receive))
        try:
            with self.kept:
                await asyncio.wait((writer, watch), return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watch.cancel()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        async for event in self.events:
            await send({"type": "http.response.body", "body": framed(event), "more_body": True})
        done = b"data: [DONE]\n\n"
        await send({"type": "http.response.body", "body": done, "more_body": True})


def framed(event: object) -> bytes:
    """An object as one server-sent event."""
    return b"data: " + to_json(event) + b"\n\n"
