"""The connections of a worker, and what their clients are told if it dies while it writes for them.

For each text that a worker has begun to answer it hands a copy of the connection to its parent, and
takes it back when the text is done. Where the worker dies, the parent ends those answers: a stream
with an error event, another with status 502. Short requests aren't handed over; their clients see
the connection close.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

from quantize.run.serve.arriving import Arriving, last_answer
from quantize.run.serve.errors import Refused, error_body
from quantize.run.serve.exchange import framed

LARGE = 2**16  # bytes
STREAM, WHOLE, DONE = b"s", b"w", b"-"
DIED = Refused("the worker that wrote this has died", status=502)
_transports: dict[Any, Any] = {}  # of the connections of this worker, by the address of the client


class Gathered:
    """A transport that writes what belongs together at once.

    uvicorn writes the head of an answer and its body one after the other; each write takes about as
    long as to read the JSON of a small request, and wakes the client.

    Args:
        transport: of the event loop; what isn't about writing is left to it.
    """

    def __init__(self, transport: Any) -> None:
        self._transport, self._held = transport, b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send, in the next pass of the event loop at the latest."""
        if len(data) > LARGE:  # to put it behind others would copy it
            self.flush()
            self._transport.write(data)
            return
        if not self._held:
            asyncio.get_running_loop().call_soon(self.flush)
        self._held += data

    def flush(self) -> None:
        """Send now."""
        data, self._held = self._held, b""
        if data:
            self._transport.write(data)

    def write_eof(self) -> None:
        """Send nothing more."""
        self.flush()
        self._transport.write_eof()

    def close(self) -> None:
        """Close, once everything is sent."""
        self.flush()
        self._transport.close()


class Connection(Arriving):
    """uvicorn's protocol, that can be found by its client.

    Args:
        lost: called when the connection is closed.
        options: uvicorn's.
    """

    transport: Any

    def __init__(self, lost: Callable[[], None], **options: Any) -> None:
        super().__init__(**options)
        self._lost = lost

    def connection_made(self, transport: Any) -> None:
        gathered: Any = Gathered(transport)
        super().connection_made(gathered)
        _transports[self.client] = transport

    def connection_lost(self, exc: Exception | None) -> None:
        _transports.pop(self.client, None)
        self._lost()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self.transport.flush()
        super().on_response_complete()


class Keeper:
    """The worker's side: hands connections to the parent and takes them back.

    Args:
        channel: to the parent; None: there is no parent, and nothing is kept.
    """

    def __init__(self, channel: socket.socket | None = None) -> None:
        self._channel = channel

    @contextlib.contextmanager
    def kept(self, client: Any, stream: bool) -> Iterator[None]:
        """Have the parent keep the connection of a client while the block runs.

        Args:
            client: its address, as in the scope of ASGI.
            stream: whether the head of a stream was sent; otherwise nothing was.
        """
        transport = _transports.get(tuple(client or ()))
        if self._channel is None or transport is None:
            yield
            return
        number = transport.get_extra_info("socket").fileno()
        form, name = STREAM if stream else WHOLE, b"%d" % number
        socket.send_fds(self._channel, [form + name], [number])
        try:
            yield
        finally:
            self._channel.send(DONE + name)


class Kept:
    """The parent's side, of one worker."""

    def __init__(self) -> None:
        self.channel, self.workers_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.channel.setblocking(False)
        self._held: dict[bytes, tuple[bytes, int]] = {}

    def read(self) -> None:
        """Take what the worker has handed over, and let go of what it takes back."""
        while True:
            try:
                message, copies, _, _ = socket.recv_fds(self.channel, 64, 1)
            except BlockingIOError:
                return
            form, name = message[:1], message[1:]
            self._let_go(name)
            if copies:
                self._held[name] = form, copies[0]

    def end(self) -> int:
        """Tell the clients of a worker that has died; returns how many there were."""
        self.read()
        count = len(self._held)
        for form, copy in self._held.values():
            with contextlib.suppress(OSError):
                os.write(copy, last_words(form))
        self.close()
        return count

    def close(self) -> None:
        """Let go of everything."""
        for name in list(self._held):
            self._let_go(name)
        self.channel.close()

    def _let_go(self, name: bytes) -> None:
        _, copy = self._held.pop(name, (b"", -1))
        if copy >= 0:
            os.close(copy)


def last_words(form: bytes) -> bytes:
    """How an answer ends whose worker has died."""
    if form == STREAM:
        event = framed(error_body(DIED))
        return b"%x\r\n%s\r\n0\r\n\r\n" % (len(event), event)
    return last_answer(DIED)
