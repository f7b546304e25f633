"""A load generator: a process of its own that sends requests to an HTTP server and times answers.

It reads a JSON object from standard input and writes one to standard output:

    address     host and port
    requests    base64 of whole HTTP requests; client i sends number i, i + clients, ...
    clients     connections, each with one request under way
    total       requests in all
    rate        requests per second, sent whether or not earlier ones were answered, each by the
                client that has been idle for longest, or by one more where none is; null: each
                client sends when it has its answer
    limit_s     after so long no more are sent

The answer has, per request, its status, the seconds to its first byte of text and to its end, how
many server-sent events it had, and the CPU that this process had taken by then. Load and server
share the machine, so a request costs this process as little as it can: callbacks on bytes, no task
and no stream per connection.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import uvloop

END = b"\r\n\r\n"


@dataclass
class Answer:
    """What came of a request.

    status 0: no answer. start_s: when it was sent, from the begin. bytes: of the body. cpu_s: what
    this process took until the answer's end, its start and imports included.
    """

    start_s: float
    status: int = 0
    first_s: float = 0.0
    end_s: float = 0.0
    events: int = 0
    bytes: int = 0
    error: bool = False
    cpu_s: float = 0.0


class Client(asyncio.Protocol):
    """A connection that is opened again when it is lost.

    Args:
        address: host and port.
        free: called with the client when a request is done.
    """

    def __init__(self, address: str, free: Callable[[Client], None]) -> None:
        self.host, _, self.port = address.rpartition(":")
        self.free = free
        self.transport: Any = None
        self.request = b""
        self.answer: Answer | None = None
        self.started = 0.0
        self.number = 0

    def ask(self, request: bytes, answer: Answer) -> None:
        """Send a request; `free` is called when it is done."""
        self.request, self.answer = request, answer
        self.held, self.length, self.in_chunks = b"", -1, False
        self.started = time.perf_counter()
        if self.transport is None:
            loop = asyncio.get_running_loop()
            opening = loop.create_connection(lambda: self, self.host, int(self.port))
            asyncio.ensure_future(opening).add_done_callback(self._opened)
        else:
            self.transport.write(request)

    def _opened(self, opening: asyncio.Future) -> None:
        if opening.exception() is not None:
            self._end(failed=True)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self.request)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.answer is not None:
            self._end(failed=True)

    def data_received(self, data: bytes) -> None:
        if self.answer is None:
            return
        self.held = self.held + data if self.held else data
        if not self.answer.status and not self._read_head():
            return
        if self.in_chunks:
            self._read_chunks()
        elif len(self.held) >= self.length:
            self.answer.bytes = self.length
            self._end()

    def _read_head(self) -> bool:
        """Whether the head of the answer is there; it is taken off what was read."""
        place = self.held.find(END)
        if place < 0:
            return False
        head = self.held[:place].lower()
        self.held = self.held[place + len(END) :]
        self.closes = b"connection: close" in head
        self.in_chunks = b"transfer-encoding: chunked" in head
        if not self.in_chunks:
            self.length = int(head.split(b"\r\ncontent-length: ")[1].split(b"\r\n")[0])
        self.answer.status = int(head[9:12])  # type: ignore[union-attr]
        return True

    def _read_chunks(self) -> None:
        while (place := self.held.find(b"\r\n")) >= 0:
            size, start = int(self.held[:place], 16), place + 2
            if len(self.held) < start + size + 2:
                return
            chunk = self.held[start : start + size]
            self.held = self.held[start + size + 2 :]
            if not size:
                self._end()
                return
            self._note(chunk)

    def _note(self, chunk: bytes) -> None:
        answer = self.answer
        assert answer is not None
        answer.bytes += len(chunk)
        answer.error |= b'data: {"error"' in chunk
        if b"data: {" in chunk and not answer.events:
            answer.first_s = time.perf_counter() - self.started
        answer.events += chunk.count(b"data: {")

    def _end(self, failed: bool = False) -> None:
        answer, self.answer = self.answer, None
        assert answer is not None
        answer.error |= failed
        answer.end_s = time.perf_counter() - self.started
        answer.cpu_s = time.process_time()
        if self.transport is not None and (failed or self.closes):
            self.transport.close()
            self.transport = None
        self.free(self)


class Load:
    """What a job asks for, under way.

    Args:
        job: see the header.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.answers = job, []
        self.requests = [base64.b64decode(each) for each in job["requests"]]
        self.begin = time.perf_counter()
        self.idle: deque[Client] = deque()
        self.under_way = 0
        self.done = asyncio.get_running_loop().create_future()

    def elapsed(self) -> float:
        return time.perf_counter() - self.begin

    def may_send(self) -> bool:
        return len(self.answers) < self.job["total"] and self.elapsed() < self.job["limit_s"]

    def send(self, client: Client, number: int) -> None:
        """One request more."""
        answer = Answer(self.elapsed())
        self.answers.append(answer)
        self.under_way += 1
        client.ask(self.requests[number % len(self.requests)], answer)

    async def run(self) -> list[Answer]:
        """Send all requests."""
        if self.job["rate"]:
            await self._at_a_rate()
        else:
            self._in_turn()
        await self.done
        return self.answers

    def _in_turn(self) -> None:
        """Each client sends when it has its answer."""

        def again(client: Client) -> None:
            self.under_way -= 1
            client.number += self.job["clients"]
            if self.may_send():
                self.send(client, client.number)
            elif not self.under_way:
                self.done.set_result(None)

        for number in range(self.job["clients"]):
            client = Client(self.job["address"], again)
            client.number = number
            if self.may_send():
                self.send(client, number)

    async def _at_a_rate(self) -> None:
        """Each request at its time, over the connection that is free for longest, or a new one."""
        all_sent = False

        def free(client: Client) -> None:
            self.under_way -= 1
            self.idle.append(client)
            if all_sent and not self.under_way:
                self.done.set_result(None)

        self.idle += [Client(self.job["address"], free) for _ in range(self.job["clients"])]
        for number in range(self.job["total"]):
            due = number / self.job["rate"]
            await asyncio.sleep(max(0.0, due - self.elapsed()))
            if not self.may_send():
                break
            client = self.idle.popleft() if self.idle else Client(self.job["address"], free)
            self.send(client, number)
        all_sent = True
        if not self.under_way:
            self.done.set_result(None)


async def run(job: dict[str, Any]) -> list[Answer]:
    """The answers to a job's requests."""
    return await Load(job).run()


if __name__ == "__main__":
    found = uvloop.run(run(json.load(sys.stdin)))
    json.dump([asdict(answer) for answer in found], sys.stdout)
