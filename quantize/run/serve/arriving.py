"""uvicorn's protocol with limits on how a request may arrive.

httptools keeps the whole head of a request, however long, and uvicorn waits for its end for ever. A
few clients that send headers without end, or nothing at all, would take all memory or all
descriptors. Here such a request is refused and its connection closed. What an answer takes isn't
limited.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from quantize.run.serve.errors import Refused, error_body
from quantize.run.serve.exchange import to_json

HEAD_BYTES = 1 << 16  # of a request, beside its body
FRAMING = 8  # bytes that a byte of a body may take in chunks
PATIENCE_S = 30.0
LEAST_BYTES = 1 << 15  # of a request that come in PATIENCE_S
LINGER_S = 2.0  # a client that still sends is read so long: else the system drops its answer


class Arriving(HttpToolsProtocol):
    """A connection whose requests come in time and with heads of limited size.

    Args:
        options: uvicorn's.
    """

    parser: Any  # of httptools, until the connection is lost

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._since: float | None = self.loop.time()  # waits for a request, or for more of it
        self._came = self._beside = 0  # bytes since then; bytes that belong to no body
        self._refused = False

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._since is None:
            self._since, self._came = self.loop.time(), 0
        self._came += len(data)
        self._beside += len(data)
        super().data_received(data)
        if self._beside > HEAD_BYTES and not self.transport.is_closing():
            self._refuse(Refused(f"a head of more than {HEAD_BYTES} bytes", status=431))

    def on_headers_complete(self) -> None:
        if not (self.parser.should_upgrade() and self._announces_body()):
            super().on_headers_complete()
            return
        # What follows isn't parsed as HTTP any more: the body would seem to be empty.
        self._refuse(Refused("Upgrade: HTTP/1.1 alone is spoken; send a body without it"))

    def on_body(self, body: bytes) -> None:
        self._beside = max(0, self._beside - FRAMING * len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._since, self._beside = None, 0
        if not self._refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        if self._since is not None:  # nothing was read while that answer was made
            self._since, self._came = self.loop.time(), 0
        super().on_response_complete()

    def check_pace(self) -> None:
        """End the connection of a client that lets us wait for its request."""
        now = self.loop.time()
        if self._refused or self._since is None or now - self._since < PATIENCE_S:
            return
        if self._is_answering():
            return
        if self._came >= LEAST_BYTES:
            self._since, self._came = now, 0
            return
        message = f"fewer than {LEAST_BYTES} bytes of the request came in {PATIENCE_S:g} s"
        self._refuse(Refused(message, status=408))

    def _announces_body(self) -> bool:
        names = {name for name, value in self.headers if value != b"0"}
        return not names.isdisjoint((b"content-length", b"transfer-encoding"))

    def _is_answering(self) -> bool:
        """Whether a request that came whole isn't answered yet."""
        if self.cycle is None or self.cycle.response_complete:
            return False
        return bool(self.pipeline) or not self.cycle.more_body

    def _refuse(self, refused: Refused) -> None:
        self._refused = True
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            self.transport.write(last_answer(refused))
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)


def last_answer(refused: Refused) -> bytes:
    """A whole answer, behind which the connection is closed."""
    body, phrase = to_json(error_body(refused)), HTTPStatus(refused.status).phrase
    lines = [
        f"HTTP/1.1 {refused.status} {phrase}",
        "content-type: application/json",
        "connection: close",
        f"content-length: {len(body)}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
