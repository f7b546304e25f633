"""A fresh process per artifact: `Worker` is the caller's end, `serve` the child's, `Nursery` starts the children.

Fresh means: of one Python that has imported torch and this package and nothing else, the nursery, each child is forked. The
nursery runs no tensor operation and sees no model, so a child starts without thread pools, packed weights or chosen kernels,
and with the nursery's few pages as its memory; only the seconds that importing takes are spent once instead of per artifact.
Where there is no fork (Windows) each child is a Python of its own.

What the child needs of the caller (inputs, `evaluate`, a foreign architecture) goes once, pickled, into a private temporary
file that all workers read. After that the caller sends one JSON line per request and gets one JSON line back, so nothing a
child says is ever unpickled, and only the child that was asked computes. A child that dies, or doesn't answer in time, is a
`MeasurementError`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, BinaryIO

import torch
from torch.utils import _pytree as pytree

from quantize.checkpoint import CheckpointError
from quantize.host import allocator_state, keep_allocations
from quantize.measure.artifact import Artifact, MeasurementError

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])
_ERRORS: dict[str, type[Exception]] = {e.__name__: e for e in (CheckpointError, TypeError, ValueError)}


class CannotSend(Exception):
    """Something of the caller's that another process can't have: a lambda, a class of the script that runs."""


class _Pickler(pickle.Pickler):
    """Refuses what the child could not import: its `__main__` is another module than the caller's."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (FunctionType, type)) and obj.__module__ == "__main__":
            raise CannotSend(f"{obj.__qualname__} is defined in the running script; put it into a module")
        return NotImplemented


def pack(obj: Any) -> bytes:
    """Pickle for a child. Raises CannotSend with the reason."""
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(obj)
    except Exception as error:  # pickling runs the __reduce__ of anybody's classes
        raise CannotSend(" ".join(str(error).split())[:200]) from error
    return buffer.getvalue()


def pack_inputs(example_inputs: Any) -> bytes:
    """Pickle example inputs, tensors moved to the CPU and without the rest of a storage that they are a view of."""
    return pack(pytree.tree_map_only(torch.Tensor, lambda t: t.detach().cpu().contiguous().clone(), example_inputs))


class Nursery:
    """Starts the children of one comparison, with `threads` threads each. A context manager, to be left after them."""

    def __init__(self, *, threads: int, timeout_s: float):
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [_PACKAGE_PARENT, os.environ.get("PYTHONPATH")]))
        # -P: a folder named like a module, where the caller stands, must not get in
        command = [sys.executable, "-P", "-m", "quantize.measure"]
        self._spawn, self.threads, self._process = (
            partial(subprocess.Popen, [*command, "--serve"], env=environment),
            threads,
            None,
        )
        if hasattr(os, "fork"):
            self._control, theirs = socket.socketpair()
            self._control.settimeout(timeout_s)
            self._stderr = tempfile.TemporaryFile()
            with theirs:
                self._process = subprocess.Popen([*command, "--nursery"], env=environment, stdin=theirs, stderr=self._stderr)

    def start(self, stdin: int, stdout: int, stderr: int) -> subprocess.Popen | _Forked:
        """A child with these file descriptors as its standard streams."""
        if self._process is None:
            return self._spawn(stdin=stdin, stdout=stdout, stderr=stderr)
        return _Forked(self.ask(b"fork", [stdin, stdout, stderr]), self)

    def ask(self, message: bytes, streams: Sequence[int] = ()) -> int:
        """One request to the forking process: see `nursery`."""
        try:
            socket.send_fds(self._control, [message], streams)
            reply = self._control.recv(32)
        except OSError as error:  # out of time, or reset by a process that is gone
            reply, reason = b"", str(error)
        else:
            reason = "no answer"
        if not reply:
            said = _last_line(self._stderr) or reason
            raise MeasurementError(f"the process that starts the measuring processes has failed: {said}")
        return int(reply)

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._control.close()
            self._stderr.close()


@dataclass
class _Forked:
    """A child of the nursery's, with what `Worker` uses of a Popen. It stays a zombie, and its id its own, until `wait`."""

    pid: int
    nursery: Nursery
    returncode: int | None = None

    def kill(self) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = self.nursery.ask(b"%d" % self.pid)
        return self.returncode


def nursery(control: socket.socket) -> None:
    """The forking process: three file descriptors ask for a child with these standard streams, a process id for its exit code.

    Returns in each child; in the nursery itself never.
    """
    while True:
        message, streams, _, _ = socket.recv_fds(control, 32, 3)
        if not message:  # the caller is gone
            os._exit(0)
        if not streams:
            control.sendall(b"%d" % os.waitstatus_to_exitcode(os.waitpid(int(message), 0)[1]))
            continue
        pid = os.fork()
        if not pid:
            os.close(control.detach())
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
        for stream in streams:
            os.close(stream)
        if not pid:
            return
        control.sendall(b"%d" % pid)


class Worker:
    """A child process that holds one artifact; the same methods as `Artifact`. Close it, or use it as a context manager."""

    def __init__(self, nursery: Nursery, path: str | Path, payload: Path, *, keep: bool, timeout_s: float):
        self.name, self.timeout_s = str(path), timeout_s
        self._stderr = tempfile.TemporaryFile()
        stdin, requests = os.pipe()
        replies, stdout = os.pipe()
        self._requests, self._replies = os.fdopen(requests, "wb"), os.fdopen(replies, "rb")
        try:
            self._process = nursery.start(stdin, stdout, self._stderr.fileno())
        finally:
            os.close(stdin)
            os.close(stdout)
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()  # None: the child is gone
        threading.Thread(target=self._pump, daemon=True).start()
        request = {"path": os.fspath(path), "payload": str(payload), "keep": keep, "threads": nursery.threads}
        try:
            self.allocator: str = self._ask("start", **request)
        except BaseException:
            self.close()
            raise

    def load(self) -> dict[str, Any]:
        return self._ask("load")

    def warm_up(self) -> dict[str, Any]:
        return self._ask("warm_up")

    def burst(self, seconds: float) -> list[float]:
        return self._ask("burst", seconds=seconds)

    def evaluate(self) -> dict[str, float]:
        return self._ask("evaluate")

    def peak_rss_mb(self) -> float | None:
        return self._ask("peak_rss_mb")

    def close(self) -> None:
        """End the child, whatever it is doing, and reap it."""
        self._process.kill()
        with contextlib.suppress(MeasurementError):  # the nursery is gone, and the child no longer ours to reap
            self._process.wait()
        for stream in (self._requests, self._replies, self._stderr):
            with contextlib.suppress(OSError):  # a request that the child no longer took
                stream.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _ask(self, op: str, **arguments: Any) -> Any:
        try:
            self._requests.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            self._requests.flush()
            line = self._lines.get(timeout=self.timeout_s)
        except queue.Empty:
            self.close()
            raise MeasurementError(
                f"{self.name}: no answer to {op!r} within {self.timeout_s:g} s; its process was ended"
            ) from None
        except (BrokenPipeError, ValueError):  # ValueError: closed before
            line = None
        if line is None:
            raise self._death(op)
        reply = json.loads(line)
        if "error" not in reply:
            return reply["result"]
        if reply["error"] == CannotSend.__name__:
            raise CannotSend(reply["message"])
        if reply["error"] in _ERRORS:
            raise _ERRORS[reply["error"]](reply["message"])
        raise MeasurementError(reply["message"])

    def _pump(self) -> None:
        """A thread, because a pipe can't be waited for with a timeout on every system."""
        with contextlib.suppress(ValueError, OSError):  # closed under our hands
            for line in self._replies:
                self._lines.put(line)
        self._lines.put(None)

    def _death(self, op: str) -> MeasurementError:
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        said = _last_line(self._stderr)
        self.close()
        return MeasurementError(f"{self.name}: its process {how} during {op!r}" + (f": {said}" if said else ""))


def _last_line(file: BinaryIO) -> str:
    file.seek(0)
    return next((line[:300] for line in reversed(file.read().decode(errors="replace").splitlines()) if line.strip()), "")


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """The child: answer requests until the caller closes the pipe."""
    artifact: Artifact | None = None
    for line in requests:
        request = json.loads(line)
        op = request.pop("op")
        try:
            if op == "start":
                artifact, result = _start(**request)
            else:
                result = getattr(artifact, op)(**request)
            reply = {"result": result}
        except Exception as error:  # everything that goes wrong here must reach the caller, by name
            kind = type(error).__name__
            known = kind in _ERRORS or isinstance(error, (CannotSend, MeasurementError))
            name = artifact.name if artifact else "a measuring process"
            reply = {"error": kind, "message": str(error) if known else f"{name}: {op} failed: {kind}: {error}"}
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def _start(path: str, payload: str, keep: bool, threads: int) -> tuple[Artifact, str]:
    if keep:
        keep_allocations()
    torch.set_num_threads(threads)
    parts = pickle.loads(Path(payload).read_bytes())  # our caller's own file
    sys.path[:] = [*sys.path, *(p for p in parts.pop("sys_path") if p not in sys.path)]
    try:
        loaded = {name: pickle.loads(part) for name, part in parts.items()}
    except Exception as error:
        raise CannotSend(f"a fresh process can't import it: {' '.join(str(error).split())[:200]}") from error
    return Artifact(path, loaded.pop("example_inputs"), **loaded), allocator_state()


def write_payload(path: Path, example_inputs: bytes, *, evaluate: bytes | None, model: bytes | None) -> None:
    """The caller's things for all workers; `sys_path` so that they find the modules that these live in."""
    parts: dict[str, Any] = {"sys_path": sys.path, "example_inputs": example_inputs}
    parts |= {name: part for name, part in (("evaluate", evaluate), ("model", model)) if part is not None}
    path.write_bytes(pickle.dumps(parts))
