"""A fresh process per artifact: `Worker` is the caller's end, `serve` the child's.

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
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import FunctionType
from typing import Any, BinaryIO

import torch
from torch.utils import _pytree as pytree

from quantize.checkpoint import CheckpointError
from quantize.measure.artifact import Artifact, MeasurementError
from quantize.measure.host import allocator_state, keep_allocations

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


class Worker:
    """A child process that holds one artifact; the same methods as `Artifact`. Close it, or use it as a context manager."""

    def __init__(self, path: str | Path, payload: Path, *, threads: int, keep: bool, timeout_s: float):
        self.name, self.timeout_s = str(path), timeout_s
        self._request = {"path": os.fspath(path), "payload": str(payload), "keep": keep, "threads": threads}
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [_PACKAGE_PARENT, os.environ.get("PYTHONPATH")]))
        self._stderr = tempfile.TemporaryFile()
        self._process = subprocess.Popen(  # -P: a folder named like a module, where the caller stands, must not get in
            [sys.executable, "-P", "-m", "quantize.measure", "--serve"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, env=environment,
        )  # fmt: skip
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()  # None: the child is gone
        threading.Thread(target=self._pump, daemon=True).start()

    def start(self) -> str:
        """Wait until the child has imported torch and read the caller's things; its allocator state."""
        return self._ask("start", **self._request)

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
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                with contextlib.suppress(OSError):  # a request that the child no longer took
                    stream.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _ask(self, op: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
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
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError, OSError):  # closed under our hands
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put(None)

    def _death(self, op: str) -> MeasurementError:
        code = self._process.wait()
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip().splitlines()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self.close()
        return MeasurementError(f"{self.name}: its process {how} during {op!r}" + (f": {said[-1][:300]}" if said else ""))


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
