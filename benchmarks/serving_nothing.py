"""A server that answers requests at once with the same bytes: the floor of the load generator."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import uvloop

END = b"\r\n\r\n"
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 200\r\n\r\n" + bytes(200)


class Nothing(asyncio.Protocol):
    """A connection."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.held = b""

    def data_received(self, data: bytes) -> None:
        self.held += data
        while self._take_request():
            self.transport.write(ANSWER)

    def _take_request(self) -> bool:
        """Whether a whole request was there; it is taken off what was read."""
        head, end, rest = self.held.partition(END)
        if not end:
            return False
        found = LENGTH.search(head)
        length = int(found[1]) if found else 0
        if len(rest) < length:
            return False
        self.held = rest[length:]
        return True


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Nothing, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    print(f"http://{host}:{port}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
