"""A fresh process per artifact: `Worker` is the caller's end of one, `nursery.py` starts them,
`child.py` is what runs in them.

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
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import cloudpickle
import torch
from torch.utils import _pytree as pytree

from quantize.measuring.artifact import MeasurementError
from quantize.measuring.child import ERRORS, CannotSend
from quantize.measuring.nursery import START_S, Nursery, last_line

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


class Worker:
    """A child process that holds one artifact; the same methods as `Artifact`. Close it, or use it
    as a context manager.

    Args:
        path: the artifact's file; None for a model that is in `things` as `source`.
        things: what `payload` made of the caller's inputs and functions.
        timeout_s: for each answer, from the request on; the start has `START_S` seconds of its own.
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
        # None: the child is gone
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
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
            self.allocator: str = self._ask("start", START_S, things, **request)
        except BaseException:
            self.close()
            raise

    def load(self) -> dict[str, Any]:
        return self._ask("load", self.timeout_s)

    def warm_up(self, seconds: float) -> dict[str, Any]:
        return self._ask("warm_up", self.timeout_s, seconds=seconds)

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
        code = self._process.poll()
        while code is None and time.monotonic() < deadline:  # it closes its pipe a moment before
            time.sleep(0.01)
            code = self._process.poll()
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
