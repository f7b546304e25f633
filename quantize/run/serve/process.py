"""One worker: an event loop that answers requests, until SIGTERM, and then only those that it has
accepted.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import uvicorn

from quantize.run.serve.application import app
from quantize.run.serve.keeping import Connection, Keeper
from quantize.run.serve.metrics import Metrics
from quantize.run.serve.served import Served
from quantize.run.serve.settings import Settings

KEEP_ALIVE_S = 75
# A model's thread gives up the interpreter with every operation, and where requests keep the event
# loop busy, it gets it back only after so long, by default 5 ms.
SWITCH_S = 0.0002
CRASHED = 70


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
    """uvicorn's server that says when it accepts requests, and ends when its parent has.

    Args:
        config: of uvicorn.
        ready: a pipe.
    """

    def __init__(self, config: uvicorn.Config, ready: int) -> None:
        super().__init__(config)
        self._ready, self._parent = ready, os.getppid()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            os.write(self._ready, b"+")

    async def on_tick(self, counter: int) -> bool:
        return os.getppid() != self._parent or await super().on_tick(counter)


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
            http=Connection,
            proxy_headers=False,  # connections are found by the address of their client
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        Server(config, parent.ready).run(sockets=[parent.listener])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
