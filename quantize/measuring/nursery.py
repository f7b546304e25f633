"""The process that starts the measuring ones, from the caller's side: `child.py` runs in it.

Fresh means: of one Python that has imported torch, this package and the installed packages that the
models' classes are of, and nothing else, the nursery, each child is forked. The nursery runs no
tensor operation and sees no model, so a child starts without thread pools, packed weights or chosen
kernels, and with the nursery's few pages as its memory; only the seconds that importing takes are
spent once instead of per artifact. Where there is no fork (Windows) each child is a Python of its
own. `multiprocessing` would run the caller's script again in each child, which a script without
`if __name__ == "__main__"` and a notebook don't survive.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import nn

from quantize.host import with_waiting
from quantize.measuring.artifact import MeasurementError
from quantize.measuring.child import kill_group

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])
# for a Python to start, to import torch and what the caller's things need, on a busy machine
START_S = 300.0


class Nursery:
    """Starts the children of comparisons, with `threads` threads each; launched by the first of
    them or before. A context manager, to be left after them.

    Args:
        threads: of each child.
        modules: imported before any child is forked, see `modules_of`.
    """

    def __init__(self, *, threads: int, modules: Sequence[str] = ()):
        self.modules = tuple(modules)
        environment = with_waiting(os.environ) | {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
        }
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [_PACKAGE_PARENT, os.environ.get("PYTHONPATH")])
        )
        self._environment, self.threads, self._process = environment, threads, None
        self._is_ready = False

    def launch(self) -> None:
        """Start the forking process, unless it runs; it imports while the caller goes on."""
        if not hasattr(os, "fork") or (self._process is not None and self._process.poll() is None):
            return
        self._is_ready = False
        self._control, theirs = socket.socketpair()
        self._control.settimeout(START_S)
        self._stderr = tempfile.TemporaryFile()
        with theirs:
            streams = {"stdin": theirs, "stdout": self._stderr, "stderr": self._stderr}
            self._process = self._python("--nursery", *self.modules, **streams)

    def _wait(self) -> None:
        """Until it has imported."""
        try:
            self._answer()
        except BaseException:
            self.close()
            raise
        self._is_ready = True

    def start(self, stdin: int, stdout: int, stderr: int) -> Forked | Spawned:
        """A child with these file descriptors as its standard streams."""
        self.launch()
        if self._process is None:
            return Spawned(self._python("--serve", stdin=stdin, stdout=stdout, stderr=stderr))
        if not self._is_ready:
            self._wait()
        return Forked(int(self.ask("fork", [stdin, stdout, stderr])), self)

    def ask(self, message: str, streams: Sequence[int] = ()) -> str:
        """One request to the forking process: see `child.nursery`."""
        with contextlib.suppress(OSError):  # it is gone; its last words are in `_answer`
            socket.send_fds(self._control, [message.encode()], streams)
        return self._answer()

    def close(self) -> None:
        """End the forking process, and with it what its children may have left."""
        if self._process is None:
            return
        self._control.close()
        if not self._is_ready:
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        self._process.kill()
        self._process.wait()
        self._stderr.close()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _answer(self) -> str:
        try:
            reply, reason = self._control.recv(32), "no answer"
        except OSError as error:  # out of time, or reset by a process that is gone
            reply, reason = b"", str(error)
        if not reply:
            said = last_line(self._stderr) or reason
            raise MeasurementError(
                f"the process that starts the measuring processes has failed: {said}"
            )
        return reply.decode()

    def _python(self, *arguments: str, **streams: Any) -> subprocess.Popen:
        """A session of its own keeps the terminal's Ctrl-C, which is the caller's to handle, from
        it.
        """
        # -P: a folder named like a module, where the caller stands, must not get in
        command = [sys.executable, "-P", "-m", "quantize.measuring", *arguments]
        return subprocess.Popen(command, env=self._environment, start_new_session=True, **streams)


@dataclass
class Forked:
    """A child of the nursery's. It is not reaped, and its process id not used again, before it is
    found to have ended.
    """

    pid: int
    nursery: Nursery
    returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._ask("poll")

    def end(self) -> None:
        """Kill and reap it, and what it has started."""
        try:
            self._ask("end")
        except MeasurementError:  # the nursery is gone, and the child no longer ours to reap
            kill_group(self.pid)

    def _ask(self, request: str) -> int | None:
        if self.returncode is None:
            reply = self.nursery.ask(f"{request} {self.pid}")
            self.returncode = None if reply == "running" else int(reply)
        return self.returncode


@dataclass
class Spawned:
    """A Python of its own, with what `Worker` uses of a `Forked`."""

    process: subprocess.Popen

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.returncode

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self.process.poll()

    def end(self) -> None:
        """Kill and reap it, and what it has started."""
        if hasattr(os, "killpg"):
            kill_group(self.process.pid)
        self.process.kill()
        self.process.wait()


def modules_of(*models: Any) -> list[str]:
    """The modules of installed packages (transformers, timm, ...) that the classes of models are
    of: to import them takes seconds. Others may compute when they are imported, and a process that
    has computed can't be forked.
    """
    places = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    found = set()
    for model in models:
        kinds = (
            {type(module) for module in model.modules()} if isinstance(model, nn.Module) else set()
        )
        found.update(kind.__module__ for kind in kinds)
    files = {name: getattr(sys.modules.get(name), "__file__", None) or "" for name in found}
    return sorted(name for name, file in files.items() if file.startswith(places))


def last_line(file: BinaryIO) -> str:
    """What a child said last on standard error."""
    file.seek(0)
    lines = file.read().decode(errors="replace").splitlines()
    said = [line[:300] for line in lines if line.strip()]
    return said[-1] if said else ""
