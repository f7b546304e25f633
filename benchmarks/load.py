"""A load generator: a process of its own that sends requests to an HTTP server and times answers.

It reads a JSON object from standard input and writes one to standard output:

    address     host and port
    requests    base64 of whole HTTP requests; client i sends number i, i + clients, ...
    clients     connections, each with one request under way
    total       requests in all
    rate        requests per second, sent whether or not earlier ones were answered; null: each
                client sends when it has its answer
    limit_s     after so long no more are sent

The answer has, per request, its status, the seconds to its first byte of text and to its end, and
how many server-sent events it had.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Answer:
    """What came of a request.

    status 0: no answer. start_s: when it was sent, from the begin. bytes: of the body.
    """

    start_s: float
    status: int = 0
    first_s: float = 0.0
    end_s: float = 0.0
    events: int = 0
    bytes: int = 0
    error: bool = False


class Client:
    """A connection that is opened again when it is lost."""

    def __init__(self, address: str) -> None:
        self.host, _, self.port = address.rpartition(":")
        self.reader: Any = None
        self.writer: Any = None

    async def ask(self, request: bytes, answer: Answer) -> None:
        """Send a request and note what comes."""
        started = time.perf_counter()
        try:
            if self.writer is None:
                opened = await asyncio.open_connection(self.host, int(self.port), limit=1 << 24)
                self.reader, self.writer = opened
            self.writer.write(request)
            head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
            answer.status = int(head[9:12])
            if b"transfer-encoding: chunked" in head:
                await self._chunks(answer, started)
            else:
                length = int(head.split(b"\r\ncontent-length: ")[1].split(b"\r\n")[0])
                await self.reader.readexactly(length)
                answer.bytes = length
            if b"connection: close" in head:
                self.close()
        except (OSError, EOFError, ValueError, IndexError):
            answer.error = True
            self.close()
        answer.end_s = time.perf_counter() - started

    async def _chunks(self, answer: Answer, started: float) -> None:
        while size := int(await self.reader.readline(), 16):
            chunk = (await self.reader.readexactly(size + 2))[:-2]
            answer.bytes += size
            answer.error |= b'data: {"error"' in chunk
            if b"data: {" in chunk and not answer.events:
                answer.first_s = time.perf_counter() - started
            answer.events += chunk.count(b"data: {")
        await self.reader.readexactly(2)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None


async def run(job: dict[str, Any]) -> list[Answer]:
    """Send all requests."""
    requests = [base64.b64decode(each) for each in job["requests"]]
    begin, answers = time.perf_counter(), []
    clients = [Client(job["address"]) for _ in range(job["clients"])]

    def elapsed() -> float:
        return time.perf_counter() - begin

    async def work(client: Client, number: int) -> None:
        while len(answers) < job["total"] and elapsed() < job["limit_s"]:
            answers.append(answer := Answer(elapsed()))
            await client.ask(requests[number % len(requests)], answer)
            number += len(clients)

    if job["rate"]:
        await at_a_rate(job, requests, clients, answers, elapsed)
    else:
        await asyncio.gather(*(work(client, i) for i, client in enumerate(clients)))
    for client in clients:
        client.close()
    return answers


async def at_a_rate(
    job: dict[str, Any],
    requests: list[bytes],
    clients: list[Client],
    answers: list[Answer],
    elapsed: Callable[[], float],
) -> None:
    """Each request at its time, over whichever connection is free, or a new one."""
    free, tasks = list(clients), []

    async def ask(number: int) -> None:
        client = free.pop() if free else Client(job["address"])
        await client.ask(requests[number % len(requests)], answers[number])
        free.append(client)

    for number in range(job["total"]):
        due = number / job["rate"]
        await asyncio.sleep(max(0.0, due - elapsed()))
        if elapsed() > job["limit_s"]:
            break
        answers.append(Answer(elapsed()))
        tasks.append(asyncio.create_task(ask(number)))
    await asyncio.gather(*tasks)


if __name__ == "__main__":
    found = asyncio.run(run(json.load(sys.stdin)))
    json.dump([asdict(answer) for answer in found], sys.stdout)
