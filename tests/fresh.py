"""Processes forked from one that has imported torch and computed nothing: one that has run a
backward pass can't be forked for another.

What they call stands in modules that import little, as each of them imports those.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["torch", "quantize.jobs"])


def started(work: Callable[..., object], *arguments: Any) -> BaseProcess:
    """A process under way that calls `work`, a function of a module."""
    process = FRESH.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def ended(process: BaseProcess) -> int | None:
    """Its exit code, negative for a signal; None where it still runs after four minutes."""
    process.join(240)
    code = process.exitcode
    process.kill()
    return code


def in_ranks(work: Callable[..., object], count: int, *arguments: Any) -> list[int | None]:
    """The exit codes of `work` in so many processes, told what `torchrun` tells its ranks."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    ranks = [started(_as_rank, rank, told, work, arguments) for rank in range(count)]
    return [ended(rank) for rank in ranks]


def _as_rank(
    rank: int, told: dict[str, str], work: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(told, RANK=str(rank), LOCAL_RANK=str(rank))
    work(*arguments)
