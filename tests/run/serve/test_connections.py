"""How many connections workers have, and how an answer goes out, without a server."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import socket
from types import SimpleNamespace

import pytest
import uvicorn

from quantize.run.serve import process
from quantize.run.serve.keeping import LARGE, Gathered
from quantize.run.serve.metrics import Metrics


def test_the_worker_with_the_fewest_connections_is_known():
    """One that hasn't begun, takes no more, or has ended, isn't counted."""
    metrics = Metrics(["m"], workers=3)
    assert metrics.fewest_connections() == math.inf
    for row, count in ((0, 5), (2, 3)):
        metrics.row = row
        metrics.connected(count)
    assert metrics.fewest_connections() == 3
    metrics.forget(2)
    assert metrics.fewest_connections() == 5


def test_an_answer_is_written_at_once():
    """Head and body together; what is large isn't put behind others; nothing is lost by closing."""
    sent: list[bytes] = []

    class Transport:
        def write(self, data: bytes) -> None:
            sent.append(data)

        def close(self) -> None:
            sent.append(b"closed")

    async def work() -> None:
        gathered = Gathered(Transport())
        gathered.write(b"head ")
        gathered.write(b"body")
        assert not sent
        await asyncio.sleep(0)
        gathered.write(b"head ")
        gathered.write(bytes(LARGE + 1))
        gathered.write(b"last")
        gathered.close()
        await asyncio.sleep(0)

    asyncio.run(work())
    assert sent == [b"head body", b"head ", bytes(LARGE + 1), b"last", b"closed"]


class Full:
    """A listener in a process without free descriptors, to which a client has come."""

    def __init__(self) -> None:
        self.asked = 0
        self.own, self.peer = socket.socketpair()
        self.peer.send(b"a client")

    def fileno(self) -> int:
        return self.own.fileno()

    def accept(self) -> None:
        self.asked += 1
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize("others", [0, 5])
def test_a_worker_without_descriptors_waits(others: int, capsys, monkeypatch):
    """It doesn't ask for the client again and again, whether it is its turn or not."""
    monkeypatch.setattr(process, "YIELD_S", 0.0)
    metrics, listener = Metrics(["m"], workers=1), Full()
    parent = process.Parent(listener, 0, SimpleNamespace())
    server = process.Server(uvicorn.Config("unused"), parent, metrics)
    server._count = others
    metrics.connected(0)

    async def work() -> None:
        server._listen()
        await asyncio.sleep(0.05)
        server._ignore()

    asyncio.run(work())
    listener.own.close()
    listener.peer.close()
    assert listener.asked == 1
    assert capsys.readouterr().err.count("Too many open files") == 1
