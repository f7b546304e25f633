"""Requests that arrive in unusual ways, over a socket to uvicorn's protocol alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from uvicorn.server import ServerState

from quantize.run.serve import arriving
from quantize.run.serve.arriving import HEAD_BYTES, Arriving

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
Client = Callable[[asyncio.StreamReader, asyncio.StreamWriter, Arriving], Awaitable[Any]]


async def count(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the size of the body."""
    body = await Request(scope, receive).body()
    await asyncio.sleep(0.05)
    await PlainTextResponse(str(len(body)))(scope, receive, send)


def ask(client: Client) -> Any:
    """What a client gets over a connection of its own."""

    async def work() -> Any:
        config, made = uvicorn.Config(count, ws="none"), []
        config.load()

        def connect() -> Arriving:
            made.append(Arriving(config=config, server_state=ServerState(), app_state={}))
            return made[-1]

        server = await asyncio.get_running_loop().create_server(connect, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        reader, writer = await asyncio.open_connection(*address)
        await asyncio.sleep(0.01)
        found = await asyncio.wait_for(client(reader, writer, made[0]), 20)
        writer.close()
        server.close()
        return found

    return asyncio.run(work())


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"GET /", b"a" * 1000),
        (HEAD + b"X-A: ", b"a" * 1000),
        (HEAD, b"X-A: a\r\n" * 100),
        (CHUNKED + b"5;", b"a" * 1000),
        (CHUNKED + b"1\r\na\r\n0\r\n", b"X-A: a\r\n" * 100),
    ],
    ids=["line", "header", "headers", "chunk", "trailers"],
)
def test_a_head_without_end_is_refused(start: bytes, more: bytes):
    """In a line, a header, many, the extension of a chunk, or behind the body."""

    async def client(reader: Any, writer: Any, connection: Arriving) -> bytes:
        writer.write(start)
        for _ in range(2 * HEAD_BYTES // len(more)):
            writer.write(more)
        return await reader.read()

    assert ask(client).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(
    ("length", "answer"), [(5, b"HTTP/1.1 400 "), (0, b"HTTP/1.1 200 ")], ids=["body", "no body"]
)
def test_another_protocol_is_refused_only_for_a_body(length: int, answer: bytes):
    """Behind such a head no body is read: it would be answered as if there were none."""

    async def client(reader: Any, writer: Any, connection: Arriving) -> bytes:
        asked = (
            b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
        )
        writer.write(HEAD + asked + b"Content-Length: %d\r\n\r\n" % length + bytes(length))
        return await reader.readuntil(b"\r\n\r\n")

    assert ask(client).startswith(answer)


def test_small_chunks_and_pipelined_requests_are_answered():
    """A body of more than a head may have, in chunks of a byte; two requests at once."""
    size = 2 * HEAD_BYTES
    request = CHUNKED + b"1\r\na\r\n" * size + b"0\r\n\r\n"

    async def client(reader: Any, writer: Any, connection: Arriving) -> list[bytes]:
        writer.write(request + request)
        bodies = []
        for _ in range(2):
            await reader.readuntil(b"\r\n\r\n")
            bodies.append(await reader.readexactly(len(str(size))))
        return bodies

    assert ask(client) == [str(size).encode()] * 2


@pytest.mark.parametrize(
    "sent",
    [b"", HEAD, HEAD + b"Content-Length: 9\r\n\r\na"],
    ids=["nothing", "head", "body"],
)
def test_a_client_that_lets_us_wait_is_refused(sent: bytes, monkeypatch: pytest.MonkeyPatch):
    """With nothing, half a head, half a body; not before the time is over."""

    async def client(reader: Any, writer: Any, connection: Arriving) -> tuple[bytes, bytes]:
        writer.write(sent)
        await asyncio.sleep(0.05)
        connection.check_pace()
        assert not connection.transport.is_closing()
        monkeypatch.setattr(arriving, "PATIENCE_S", 0.0)
        connection.check_pace()
        return await reader.read()

    assert ask(client).startswith(b"HTTP/1.1 408 ")


def test_a_client_that_waits_or_sends_fast_enough_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    """Its request is computed, or much of it came lately, or it has asked before and rests."""
    monkeypatch.setattr(arriving, "PATIENCE_S", 0.0)
    monkeypatch.setattr(arriving, "LEAST_BYTES", 1000)

    async def client(reader: Any, writer: Any, connection: Arriving) -> bytes:
        writer.write(HEAD + b"Content-Length: 2000\r\n\r\n" + bytes(1000))
        await asyncio.sleep(0.02)
        connection.check_pace()  # enough has come
        writer.write(bytes(1000) + HEAD[:9])
        await asyncio.sleep(0.02)
        connection.check_pace()  # the answer is made
        await reader.readuntil(b"\r\n\r\n")
        connection.check_pace()
        return await reader.readexactly(4)

    assert ask(client) == b"2000"
