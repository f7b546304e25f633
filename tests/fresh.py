"""Processes forked from one that has imported torch and nothing of this package, and has computed
nothing: one that has run a backward pass can't be forked for another. So they start as a Python
does, without the seconds that torch takes, and its compiler, which torch imports for an optimizer.

What they call stands in modules that import little, as each of them imports those.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]  # of the repository
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["torch", "torch._dynamo"])


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


class Python:
    """A process under way that does what `python` does with these arguments: `-c CODE`, `-m MODULE`
    or a script, and what goes to it. `environment` is all of its environment; what torch reads
    while it is imported must stand in that of the tests.
    """

    def __init__(
        self, *command: object, where: Path = ROOT, environment: Mapping[str, str] = os.environ
    ) -> None:
        self.command = [str(word) for word in command]
        self._folder = tempfile.TemporaryDirectory(prefix="python-")
        self.streams = [Path(self._folder.name) / name for name in ("out", "err")]
        for stream in self.streams:
            stream.touch()
        self.process = started(_as_python, self.command, where, dict(environment), self.streams)

    def told(self) -> str:
        """What it has said on standard error so far."""
        return self.streams[1].read_text()

    def ended(self) -> subprocess.CompletedProcess[str]:
        """Its exit code and what it has printed."""
        code = ended(self.process)
        out, err = (stream.read_text() for stream in self.streams)
        self._folder.cleanup()
        assert code is not None, err
        return subprocess.CompletedProcess(self.command, code, out, err)


def python(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """What a `Python` printed until its end."""
    return Python(*command, **options).ended()


def _as_python(
    command: list[str], where: Path, environment: dict[str, str], streams: list[Path]
) -> None:
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(where)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    first, *rest = command
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(first, run_name="__main__")
