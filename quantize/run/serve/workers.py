"""The processes of a server: one that loads the models and watches, and workers forked from it.

The parent opens the port and loads each model once; workers are forked after that, so that the
weights lie in memory once, however many there are. It computes nothing itself. A worker that dies
is replaced. When a model's file changes, it is loaded beside the old one, new workers take over the
port, and the old ones finish what they have accepted. On SIGTERM or Ctrl-C every worker does that,
and the parent ends with the last.

Loading happens in a thread that is gone before the first fork: a forked child has no threads but
the one that forked, and the pools that OpenMP keeps belong to the thread that first computed. Gone
from the system too: before Python 3.13 a joined thread may still be giving back MKL's buffers, and
a child that is forked while it holds their lock waits for it for ever.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from quantize.host import default_threads
from quantize.native import int8
from quantize.run.serve.keeping import Kept
from quantize.run.serve.metrics import Metrics
from quantize.run.serve.process import Parent, run_worker
from quantize.run.serve.served import LONG_S, Served
from quantize.run.serve.settings import Settings

LOG = logging.getLogger("quantize.serve")
POLL_S = 0.25
MOST_WORKERS = 8  # that are started unasked
LEAST_LIFE_S = 1.0  # a worker that dies sooner is replaced only after so long
LEAVING_S = 1.0  # what a thread takes to end at most; one that is still there stays
BACKLOG = 2048
Load = Callable[[], list[Served]]


@dataclass
class Worker:
    """A process that answers requests.

    Args:
        pid: of the process.
        row: of the shared numbers.
        ready: a pipe in which a byte stands once it accepts requests.
        generation: counts how often the models were loaded.
        kept: the connections to which it writes.
    """

    pid: int
    row: int
    ready: int
    generation: int
    kept: Kept
    accepts: bool = False
    born: float = field(default_factory=time.monotonic)


class Supervisor:
    """The parent.

    Args:
        load: opens the models.
        files: whose change means that the models have to be loaded again.
        listener: the open port.
        settings: of every worker.
        count: workers; None: as many as `fitting` says.
    """

    def __init__(
        self,
        load: Load,
        files: Sequence[Path],
        listener: socket.socket,
        settings: Settings,
        count: int | None = None,
    ) -> None:
        self.load, self.files, self.listener = load, files, listener
        self.workers: dict[int, Worker] = {}
        self.stopping = False
        self.generation = 0
        self.models = in_a_thread(load)
        self.count = count or fitting(self.models)
        self.settings = replace(settings, workers=self.count)
        self._seen = self._changed = fingerprint(files)
        # While models are replaced there are two workers for each.
        self.metrics = Metrics([served.name for served in self.models], 2 * self.count)

    def run(self, started: Callable[[], None] = lambda: None) -> None:
        """Serve until a signal says to stop, and every accepted request is answered.

        Args:
            started: called once all workers accept requests.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        allow_open_files()
        LOG.info("starting %d workers", self.count)
        for _ in range(self.count):
            self._fork()
        waiting: list[Callable[[], None]] = [started]
        while self.workers:
            self._collect()
            self._wait()
            if self.stopping or not self._all_ready():
                continue
            self._retire()
            for call in waiting:
                call()
            waiting.clear()
            self._reload()

    def _wait(self) -> None:
        """Until a worker hands something over, but for POLL_S at most."""
        kept = {worker.kept.channel: worker.kept for worker in self.workers.values()}
        with contextlib.suppress(InterruptedError):
            for channel in select.select(list(kept), [], [], POLL_S)[0]:
                kept[channel].read()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        self._tell(self.workers.values())

    @staticmethod
    def _tell(workers: Iterable[Worker]) -> None:
        for worker in list(workers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGTERM)

    def _fork(self) -> None:
        taken = {worker.row for worker in self.workers.values()}
        row = min(set(range(2 * self.count)) - taken)
        ready, said = os.pipe()
        kept = Kept()
        gc.freeze()  # a collection in a child would write to every object, and so copy its page
        pid = os.fork()
        if pid == 0:
            self._leave_to_parent()
            int8.allow_threads()  # see the header
            os.close(ready)
            self.metrics.take_row(row)
            parent = Parent(self.listener, said, kept.workers_end)
            run_worker(self.models, self.settings, self.metrics, parent)
        os.close(said)
        kept.workers_end.close()
        os.set_blocking(ready, False)
        self.workers[pid] = Worker(pid, row, ready, self.generation, kept)

    def _leave_to_parent(self) -> None:
        """In a new worker: what the parent keeps for the others isn't kept here too."""
        for worker in self.workers.values():
            worker.kept.close()
            os.close(worker.ready)

    def _collect(self) -> None:
        """Take leave of workers that have ended, and replace those that shouldn't have."""
        for pid, worker in list(self.workers.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            del self.workers[pid]
            os.close(worker.ready)
            self.metrics.forget(worker.row)
            told = worker.kept.end()
            if self.stopping or worker.generation != self.generation:
                continue
            LOG.error("worker %d ended (%d), %d texts with it; it is replaced", pid, status, told)
            if time.monotonic() - worker.born < LEAST_LIFE_S:
                time.sleep(LEAST_LIFE_S)
            self._fork()

    def _all_ready(self) -> bool:
        current = [each for each in self.workers.values() if each.generation == self.generation]
        return len(current) == self.count and all(map(_is_ready, current))

    def _retire(self) -> None:
        """Let workers with models of before finish."""
        old = [each for each in self.workers.values() if each.generation != self.generation]
        self._tell(old)

    def _reload(self) -> None:
        """Load the models again if their files have changed, and no longer change."""
        found = fingerprint(self.files)
        settled, self._changed = found == self._changed, found
        if found == self._seen or not settled:
            return
        self._seen = found
        try:
            models = in_a_thread(self.load, meanwhile=self._wait)
        except Exception as error:
            LOG.error("the changed model isn't served: %s", error)
            return
        if self.stopping:
            return
        self.models, self.generation = models, self.generation + 1
        LOG.info("the models were loaded again")
        for _ in range(self.count):
            self._fork()


def fitting(models: Iterable[Served]) -> int:
    """Workers that answer most, soonest: one for each core where HTTP costs Python as much time as
    the model takes; else one, to which every request comes, so that none waits behind others while
    a core is free. One for a decoder too, which reads its weights once for all texts of a worker.
    """
    if any(served.decoder is not None or served.call_s > LONG_S for served in models):
        return 1
    return min(MOST_WORKERS, default_threads())


def _is_ready(worker: Worker) -> bool:
    if not worker.accepts:
        with contextlib.suppress(BlockingIOError):
            worker.accepts = bool(os.read(worker.ready, 1))
    return worker.accepts


def in_a_thread(load: Load, meanwhile: Callable[[], None] | None = None) -> list[Served]:
    """What `load` gives, or raises, in a thread of its own; see above."""
    result: list[list[Served]] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            result.append(load())
        except BaseException as error:
            errors.append(error)

    before = _threads()
    thread = threading.Thread(target=work)
    thread.start()
    while meanwhile is not None and thread.is_alive():
        meanwhile()
    thread.join()
    end = time.monotonic() + LEAVING_S
    while _threads() - before and time.monotonic() < end:
        time.sleep(0.001)
    if errors:
        raise errors[0]
    return result[0]


def _threads() -> set[str]:
    """Those of this process that the system knows; none where it doesn't tell."""
    try:
        return {thread.name for thread in Path("/proc/self/task").iterdir()}
    except OSError:
        return set()


def fingerprint(paths: Sequence[Path]) -> tuple:
    """What changes when a file or a folder's files are replaced."""
    marks = []
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            with contextlib.suppress(OSError):  # it is being replaced
                stat = file.stat()
                marks.append((str(file), stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return tuple(marks)


def listen(host: str, port: int) -> socket.socket:
    """The open port. Raises OSError, naming the address, where it can't be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(f"{host}:{port} can't be listened on: {error.strerror or error}") from None
    listener.set_inheritable(True)
    return listener


def allow_open_files() -> None:
    """As many connections as the system lets a process have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
