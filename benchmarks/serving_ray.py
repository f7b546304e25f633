"""Ray Serve under load while one of its two replicas is killed: no request without an answer or an
error.

    uv run --extra ray --extra serve python benchmarks/serving_ray.py

A local cluster, two replicas of a small CNN, requests at a fixed rate from a process of their own.
After a third of them one replica's process is killed. The row says how many were answered, how many
got an error, how many got neither (`lost`), and after how long there were two replicas again.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ray
import rows
from ray import serve
from rows import Row
from services import images, load

from quantize.run.serve import Settings
from quantize.run.serve import ray as ours


class Address:
    """Where the proxy listens."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"


def replicas() -> set[int]:
    """The processes of the replicas, by the title that Ray gives them."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            title = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue
        if title.startswith(b"ray::ServeReplica:") and ours.NAME.encode() in title:
            found.add(int(entry.name))
    return found


def running() -> int:
    """Replicas that answer, as Ray's controller counts them."""
    application = serve.status().applications[ours.NAME]
    states = application.deployments[ours.NAME].replica_states
    return sum(count for name, count in states.items() if "RUNNING" in str(name))


def killed_under_load(service: Any, place: Any, total: int, rate: float) -> Row:
    """One replica is killed after a third of the requests."""
    answers: list[dict[str, Any]] = []
    options = {"clients": 16, "total": total, "rate": rate, "limit_s": 120}
    work = threading.Thread(target=lambda: answers.extend(load(place, service.requests, **options)))
    before = replicas()
    work.start()
    time.sleep(total / rate / 3)
    os.kill(min(before), signal.SIGKILL)
    died = time.monotonic()
    while len(replicas() - before) < 1 or running() < 2:
        time.sleep(0.1)
    again_s = time.monotonic() - died
    work.join()
    answered = sum(answer["status"] == 200 for answer in answers)
    errors = sum(answer["status"] >= 500 for answer in answers)
    about: Row = {"clients": 16, "answered": answered, "failed": errors}
    return about | {"lost": len(answers) - answered - errors, "again_s": again_s}


def main() -> None:
    parser = rows.Parser(__doc__, "serving.csv")
    parser.flag("--total", "requests", 1500)
    parser.flag("--rate", "requests per second", 100.0)
    arguments = parser.parse()
    place = Address()
    with tempfile.TemporaryDirectory() as name:
        service = images(Path(name))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        paths, settings = [service.path], Settings(threads=1)
        application = ours.deployment(paths, [service.name], settings, (2, 2), 16)
        ours.run(application, "127.0.0.1", place.port, blocking=False)
        load(place, service.requests, total=50)
        found = killed_under_load(service, place, arguments.total, arguments.rate)
        serve.shutdown()
        ray.shutdown()
    row = {"question": "replica killed", "engine": "quantize on Ray Serve", "model": service.name}
    rows.write(arguments.out, [row | found | rows.host()], ("question", "engine", "model"))


if __name__ == "__main__":
    main()
