"""A fresh process per artifact: `Worker` is the caller's end of one, `Nursery` starts them,
`child.py` is what runs in them.

Fresh means: of one Python that has imported torch and this package and nothing else, the nursery,
each child is forked. The nursery runs no tensor operation and sees no model, so a child starts
without thread pools, packed weights or chosen kernels, and with the nursery's few pages as its
memory; only the seconds that importing takes are spent once instead of per artifact. Where there is
no fork (Windows) each child is a Python of its own. `multiprocessing` would run the caller's script
again in each child, which a script without `if __name__ == "__main__"` and a notebook don't
survive.

What the child needs of the caller (inputs, `evaluate`, a foreign architecture) goes pickled through
the pipe, functions and classes of the running script by value. After that the caller sends one JSON
line per request and gets one JSON line back, so nothing a child says is ever unpickled, and only
the child that was asked computes. A child that dies, or doesn't answer in time, is a
`MeasurementError`. Nothing is written to a disk, so nothing stays behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import cloudpickle
import torch
from torch.utils import _pytree as pytree

from quantize.host import with_waiting
from quantize.measuring.artifact import MeasurementError
from quantize.measuring.child import ERRORS, CannotSend, kill_group

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])
# for a Python to start, to import torch and what the caller's things need, on a busy machine
_START_S = 300.0
_LOOK_S = 1.0  # how often a silent child is asked whether it lives


def pack(obj: Any) -> bytes:
    """Pickle for a child. Raises CannotSend with the reason."""
    try:
        return cloudpickle.dumps(obj)
    except Exception as error:  # pickling runs the __reduce__ of anybody's classes
        raise CannotSend(" ".join(str(error).split())[:200]) from error


def pack_inputs(example_inputs: Any) -> bytes:
    """Pickle example inputs, tensors moved to the CPU and without the rest of a storage that they
    are a view of.
    """
    return pack(
        pytree.tree_map_only(
            torch.Tensor, lambda t: t.detach().cpu().contiguous().clone(), example_inputs
        )
    )


def payload(**packed: bytes) -> bytes:
    """Packed things of the caller's by name, with `sys_path` so that a child finds the modules that
    they live in.
    """
    return pickle.dumps({"sys_path": sys.path, **packed})


class Nursery:
    """Starts the children of one comparison, with `threads` threads each. A context manager, to be
    left after them.
    """

    def __init__(self, *, threads: int):
        environment = with_waiting(os.environ) | {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
        }
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [_PACKAGE_PARENT, os.environ.get("PYTHONPATH")])
        )
        self._environment, self.threads, self._process = environment, threads, None
        if hasattr(os, "fork"):
            self._control, theirs = socket.socketpair()
            self._control.settimeout(_START_S)
            self._stderr = tempfile.TemporaryFile()
            with theirs:
                self._process = self._python(
                    "--nursery", stdin=theirs, stdout=self._stderr, stderr=self._stderr
                )
            try:
                self._answer()
            except BaseException:
                self.close()
                raise

    def start(self, stdin: int, stdout: int, stderr: int) -> Forked | Spawned:
        """A child with these file descriptors as its standard streams."""
        if self._process is None:
            return Spawned(self._python("--serve", stdin=stdin, stdout=stdout, stderr=stderr))
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

    def _python(self, role: str, **streams: Any) -> subprocess.Popen:
        """A session of its own keeps the terminal's Ctrl-C, which is the caller's to handle, from
        it.
        """
        # -P: a folder named like a module, where the caller stands, must not get in
        command = [sys.executable, "-P", "-m", "quantize.measuring", role]
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


class Worker:
    """A child process that holds one artifact; the same methods as `Artifact`. Close it, or use it
    as a context manager.

    Args:
        path: the artifact's file; None for a model that is in `things` as `source`.
        things: what `payload` made of the caller's inputs and functions.
        timeout_s: for each answer, from the request on; the start has `_START_S` seconds of its
            own.
    """

    def __init__(
        self,
        nursery: Nursery,
        path: Path | None,
        things: bytes,
        *,
        name: str,
        keep: bool,
        timeout_s: float,
    ):
        self.name, self.timeout_s = name, timeout_s
        self._stderr = tempfile.TemporaryFile()
        stdin, requests = os.pipe()
        replies, stdout = os.pipe()
        self._requests = os.fdopen(requests, "wb")
        try:
            self._process = nursery.start(stdin, stdout, self._stderr.fileno())
        finally:
            os.close(stdin)
            os.close(stdout)
        self._lines: queue.SimpleQueue[bytes | None] = (
            queue.SimpleQueue()
        )  # None: the child is gone
        threading.Thread(
            target=_pump, args=(os.fdopen(replies, "rb"), self._lines), daemon=True
        ).start()
        request = {
            "path": path and str(path),
            "keep": keep,
            "threads": nursery.threads,
            "payload_bytes": len(things),
        }
        try:
            self.allocator: str = self._ask("start", _START_S, things, **request)
        except BaseException:
            self.close()
            raise

    def load(self) -> dict[str, Any]:
        return self._ask("load", self.timeout_s)

    def warm_up(self) -> dict[str, Any]:
        return self._ask("warm_up", self.timeout_s)

    def burst(self, seconds: float) -> list[float]:
        return self._ask("burst", self.timeout_s, seconds=seconds)

    def evaluate(self) -> dict[str, float]:
        return self._ask("evaluate", self.timeout_s)

    def peak_rss_mb(self) -> float | None:
        return self._ask("peak_rss_mb", self.timeout_s)

    def close(self) -> None:
        """End the child and what it has started, whatever they are doing."""
        self._process.end()
        for stream in (self._requests, self._stderr):
            with contextlib.suppress(OSError):  # a request that the child no longer took
                stream.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _ask(self, op: str, limit_s: float, things: bytes = b"", /, **arguments: Any) -> Any:
        deadline = time.monotonic() + limit_s
        message = json.dumps({"op": op, **arguments}).encode() + b"\n"
        if things:  # more than a pipe holds
            threading.Thread(target=self._send, args=(message + things,), daemon=True).start()
        else:
            self._send(message)
        line = self._receive(deadline)
        if line is None and time.monotonic() >= deadline:
            self.close()
            raise MeasurementError(
                f"{self.name}: no answer to {op!r} within {limit_s:g} s; its process was ended"
            )
        if line is None:
            raise self._death(op)
        reply = json.loads(line)
        if "error" not in reply:
            return reply["result"]
        raise ERRORS.get(reply["error"], MeasurementError)(reply["message"])

    def _send(self, message: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):  # the child is gone, or was closed before
            self._requests.write(message)
            self._requests.flush()

    def _receive(self, deadline: float) -> bytes | None:
        """The next line; None if the child has died, or doesn't say anything before `deadline`."""
        while (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                return self._lines.get(timeout=min(left, _LOOK_S))
            if self._process.poll() is not None:  # somebody else may hold its pipe open
                with contextlib.suppress(queue.Empty):
                    return self._lines.get(timeout=_LOOK_S)
                return None
        return None

    def _death(self, op: str) -> MeasurementError:
        deadline = time.monotonic() + 10 * _LOOK_S
        while (
            code := self._process.poll()
        ) is None and time.monotonic() < deadline:  # it closes its pipe a moment before
            time.sleep(0.01)
        how = (
            f"was killed by signal {-code}" if code and code < 0 else f"ended with exit code {code}"
        )
        said = last_line(self._stderr)
        self.close()
        return MeasurementError(
            f"{self.name}: its process {how} during {op!r}" + (f": {said}" if said else "")
        )


def _pump(replies: BinaryIO, lines: queue.SimpleQueue[bytes | None]) -> None:
    """A thread, because a pipe can't be waited for with a timeout on every system. It alone touches
    and closes `replies`.
    """
    with replies:
        for line in replies:
            lines.put(line)
    lines.put(None)


def last_line(file: BinaryIO) -> str:
    """What a child said last on standard error."""
    file.seek(0)
    return next(
        (
            line[:300]
            for line in reversed(file.read().decode(errors="replace").splitlines())
            if line.strip()
        ),
        "",
    )
