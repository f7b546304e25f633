"""A server that answers every request at once with the same bytes: the floor of the load generator.

It takes a piece of bytes for a whole request, as those of the small CNN are.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvloop

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 200\r\n\r\n" + bytes(200)


class Nothing(asyncio.Protocol):
    """A connection."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(ANSWER)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Nothing, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    print(f"http://{host}:{port}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
