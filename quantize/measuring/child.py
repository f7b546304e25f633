"""The far side of a measurement: `nursery` forks the processes that measure, `serve` is what each
of them does.

Nothing here outlives the caller, however that ends. A measuring process sees the end of the pipe
that its requests come from, and leads a process group, which it kills as a whole: what `evaluate`
started goes with it. The nursery sees the end of its socket, and Linux tells it when its parent
dies (PR_SET_PDEATHSIG), for the case that somebody has inherited the caller's end. It kills the
groups of its children, which may be deep in a C function, and whatever has left those groups
(PR_SET_CHILD_SUBREAPER).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pickle
import queue
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from quantize.allocator import allocator_state, keep_allocations
from quantize.checkpoint import CheckpointError
from quantize.measuring.artifact import Artifact, MeasurementError
from quantize.native import int8

# Linux's prctl.h: the signal that comes when the parent dies; orphans below become children of this
# process.
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class CannotSend(Exception):
    """Something of the caller's that another process can't have: an open file, a module that it
    can't import.
    """


# What a child may raise by name; everything else that goes wrong becomes a MeasurementError.
_KNOWN = (CheckpointError, TypeError, ValueError, CannotSend, MeasurementError)
ERRORS: dict[str, type[Exception]] = {error.__name__: error for error in _KNOWN}


def preload(modules: Sequence[str]) -> None:
    """Import what all children will need; they say themselves what can't be imported."""
    for name in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def nursery(control: socket.socket) -> None:
    """The forking process. Returns in each child; in the nursery itself never.

    Says "ready", then answers: "fork" with three file descriptors asks for a child that has these
    as standard streams, and gets its process id; "poll PID" gets its exit code or "running"; "end
    PID" kills its group and gets its exit code.
    """
    children: set[int] = set()
    gc.freeze()  # a child's collections leave what was imported alone, and its pages shared

    def leave(*_signal: object) -> None:
        for pid in children:
            kill_group(pid)
        _end_orphans()
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's
    signal.signal(signal.SIGTERM, leave)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    control.sendall(b"ready")
    while True:
        message, streams, _, _ = socket.recv_fds(control, 64, 3)
        if not message:  # the caller is gone
            leave()
        request, _, pid = message.decode().partition(" ")
        if request == "fork":
            child = os.fork()
            if not child:
                _become_child(control, streams)
                return
            with contextlib.suppress(OSError):  # the child does it too: whoever comes first
                os.setpgid(child, child)
            for stream in streams:
                os.close(stream)
            children.add(child)
            control.sendall(b"%d" % child)
        else:
            control.sendall(_ended(int(pid), children, kill=request == "end"))


def _ended(pid: int, children: set[int], *, kill: bool) -> bytes:
    """The exit code of a child, its own if it died by itself, and "running" if it lives and may go
    on.
    """
    done, status = os.waitpid(pid, os.WNOHANG)
    if not done and not kill:
        return b"running"
    kill_group(pid)  # of one that died by itself, what it has left behind
    if not done:
        _, status = os.waitpid(pid, 0)
    children.remove(pid)
    return b"%d" % os.waitstatus_to_exitcode(status)


def _become_child(control: socket.socket, streams: list[int]) -> None:
    """What a fresh child does before anything else: lead a group, take the streams, forget the
    nursery's socket.
    """
    os.setpgid(0, 0)
    int8.allow_threads()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.close(control.detach())
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)


def kill_group(leader: int) -> None:
    """Kill a process and all that it started, but for what has left its process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: nobody but zombies
        os.killpg(leader, signal.SIGKILL)


def _end_orphans() -> None:
    """Kill what is still below this process; who dies may leave children of its own, so until there
    is nobody.
    """
    while pids := list(_children()):
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _children() -> Iterator[int]:
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended while we looked
            after_name = file.read_text(errors="replace").rpartition(")")[2]
            if int(after_name.split()[1]) == os.getpid():  # state, parent
                yield int(file.parent.name)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3)


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """A measuring process: answer requests, a JSON line each, until the caller closes the pipe."""
    asked: queue.SimpleQueue[tuple[dict[str, Any], bytes]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests, asked), daemon=True).start()
    artifact: Artifact | None = None
    while True:
        request, payload = asked.get()
        op = request.pop("op")
        try:
            if op == "start":
                artifact = _start(payload, **request)
                reply = {"result": allocator_state()}
            else:
                reply = {"result": getattr(artifact, op)(**request)}
        except Exception as error:  # everything that goes wrong here must reach the caller, by name
            kind = type(error).__name__
            name = artifact.name if artifact else "a measuring process"
            message = str(error) if kind in ERRORS else f"{name}: {op} failed: {kind}: {error}"
            reply = {"error": kind, "message": message}
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def _listen(requests: BinaryIO, asked: queue.SimpleQueue) -> None:
    """Pass requests on, each with the bytes that follow its line; at the end of the pipe end this
    process and its group.
    """
    for line in requests:
        request = json.loads(line)
        asked.put((request, requests.read(request.pop("payload_bytes", 0))))
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _start(payload: bytes, path: str | None, keep: bool, threads: int) -> Artifact:
    """The artifact, made of what `process.payload` packed."""
    if keep:
        keep_allocations()
    torch.set_num_threads(threads)
    parts = pickle.loads(payload)  # our caller's own
    sys.path[:] = [*sys.path, *(p for p in parts.pop("sys_path") if p not in sys.path)]
    try:
        loaded = {name: pickle.loads(part) for name, part in parts.items()}
    except Exception as error:
        raise CannotSend(
            f"a fresh process can't read it: {' '.join(str(error).split())[:200]}"
        ) from error
    source = loaded.pop("source") if path is None else path
    return Artifact(source, loaded.pop("example_inputs"), **loaded)
