"""One worker: an event loop that answers requests, until SIGTERM, and then only those that it has
accepted.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import uvicorn

from quantize.run.serve.application import app
from quantize.run.serve.keeping import Connection, Keeper
from quantize.run.serve.metrics import Metrics
from quantize.run.serve.served import Served
from quantize.run.serve.settings import Settings

LOG = logging.getLogger("quantize.serve")
KEEP_ALIVE_S = 75
# A model's thread gives up the interpreter with every operation, and where requests keep the event
# loop busy, it gets it back only after so long, by default 5 ms.
SWITCH_S = 0.0002
CRASHED = 70
ORPHAN_S = 30  # for what was accepted, once the parent has died
SLACK = 16  # a worker may have a part of so many more connections than another
YIELD_S = 0.001  # how long a connection is left to another worker
PACES_S = 1.0  # so often clients that let us wait are looked for
FULL_S = 1.0  # how long none is taken by one that has no more descriptors


@dataclass(frozen=True)
class Parent:
    """What a worker has from its parent.

    Args:
        listener: the open port, which other workers listen on too.
        ready: a pipe that gets a byte once requests are accepted.
        channel: for connections that the parent keeps.
    """

    listener: socket.socket
    ready: int
    channel: socket.socket


class Server(uvicorn.Server):
    """uvicorn's server that shares connections evenly with other workers, says when it accepts
    them, and ends when its parent has.

    The system lets any worker that is awake take a connection: of 64 clients that connected at once
    one worker of two had 51. A worker that has more than another leaves the next connection to it,
    and takes it itself only if it is still there after a while.

    Args:
        config: of uvicorn.
        parent: whose listener it is.
        metrics: where workers tell each other how many connections they have.
    """

    def __init__(self, config: uvicorn.Config, parent: Parent, metrics: Metrics) -> None:
        super().__init__(config)
        self._channel, self._metrics = parent, metrics
        self._parent = os.getppid()
        self._count = 0
        self._pause: asyncio.TimerHandle | None = None
        self._opening: set[asyncio.Future] = set()  # the event loop alone wouldn't keep them

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])  # it listens to no socket by itself
        if self.started:
            self._channel.listener.setblocking(False)
            self._counted(0)
            self._listen()
            self._check_paces()
            os.write(self._channel.ready, b"+")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._ignore()
        self._metrics.connected(math.inf)
        await super().shutdown([self._channel.listener])

    async def on_tick(self, counter: int) -> bool:
        if os.getppid() == self._parent:
            return await super().on_tick(counter)
        LOG.error("the parent has died: this worker ends too, in %d s at most", ORPHAN_S)
        signal.alarm(ORPHAN_S)  # the system ends it, even in a call that never returns
        return True

    def _check_paces(self) -> None:
        """Of all connections, until the process ends: a client mustn't hold up that either."""
        for connection in list(self.server_state.connections):
            connection.check_pace()  # type: ignore[union-attr]
        asyncio.get_running_loop().call_later(PACES_S, self._check_paces)

    def _counted(self, change: int) -> None:
        self._count += change
        if not self.should_exit:
            self._metrics.connected(self._count)

    def _listen(self) -> None:
        self._pause = None
        asyncio.get_running_loop().add_reader(self._channel.listener, self._offered)

    def _ignore(self) -> None:
        asyncio.get_running_loop().remove_reader(self._channel.listener)
        if self._pause is not None:
            self._pause.cancel()

    def _offered(self) -> None:
        """A client waits for a worker."""
        least = self._metrics.fewest_connections()
        if self._count <= least + least // SLACK:
            self._take()
        else:
            self._wait(YIELD_S)

    def _wait(self, seconds: float) -> None:
        """Leave those that come to other workers for so long."""
        self._ignore()
        self._pause = asyncio.get_running_loop().call_later(seconds, self._remained)

    def _remained(self) -> None:
        self._listen()
        self._take()

    def _take(self) -> None:
        """Accept a connection, unless another worker has, or the client is gone."""
        try:
            connection, _ = self._channel.listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            LOG.error("no connection is accepted for %g s: %s", FULL_S, error.strerror)
            self._wait(FULL_S)
            return
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._counted(1)
        opening = asyncio.get_running_loop().connect_accepted_socket(self._connection, connection)
        task = asyncio.ensure_future(opening)
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    def _connection(self) -> Connection:
        return Connection(
            partial(self._counted, -1),
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )


def run_worker(
    models: Sequence[Served],
    settings: Settings,
    metrics: Metrics,
    parent: Parent,
) -> NoReturn:
    """Be a worker; the process ends with it.

    Args:
        models, settings, metrics: those of the app.
        parent: what the worker has from it.
    """
    code = CRASHED
    try:
        sys.setswitchinterval(SWITCH_S)
        # uvicorn puts handlers of its own in their place, and these back when it has finished.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        config = uvicorn.Config(
            app(models, settings, metrics=metrics, keeper=Keeper(parent.channel)),
            ws="none",
            proxy_headers=False,  # connections are found by the address of their client
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        Server(config, parent, metrics).run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
