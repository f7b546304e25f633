"""Ray Serve on a local cluster: a replica that is killed, and replicas that come and go with the
load.

    uv run --extra ray --extra serve python benchmarks/serving_ray.py

Questions, about a small CNN, with requests from a process of their own:

- killed: of two replicas, at a fixed rate, one is killed after a third of the requests. The row
  says how many were answered, how many got an error, how many got neither (`lost`), and after how
  long there were two replicas again (`again_s`).
- scaled: one replica, allowed two, and 16 clients that each wait for their answer. The row says
  after how long there were two (`up_s`), and how long after the end of the load one again
  (`down_s`); both contain the delays that the deployment asks for, 2 and 5 s.
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

DELAYS = (2.0, 5.0)  # seconds until Ray adds a replica, and until it takes one away
LOAD_S = 30.0


class Address:
    """Where the proxy listens."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"


def replica_processes() -> set[int]:
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
    before = replica_processes()
    work.start()
    time.sleep(total / rate / 3)
    os.kill(min(before), signal.SIGKILL)
    died = time.monotonic()
    while len(replica_processes() - before) < 1 or running() < 2:
        time.sleep(0.1)
    again_s = time.monotonic() - died
    work.join()
    answered = sum(answer["status"] == 200 for answer in answers)
    errors = sum(answer["status"] >= 500 for answer in answers)
    about: Row = {"clients": 16, "answered": answered, "failed": errors}
    return about | {"lost": len(answers) - answered - errors, "again_s": again_s}


def scaled_by_load(service: Any, place: Any) -> Row:
    """A second replica comes while there is load, and goes when it has ended."""
    answers: list[dict[str, Any]] = []
    options = {"clients": 16, "total": 10**6, "limit_s": LOAD_S}
    work = threading.Thread(target=lambda: answers.extend(load(place, service.requests, **options)))
    work.start()
    up_s = until(2)
    work.join()
    down_s = until(1)
    answered = sum(answer["status"] == 200 for answer in answers)
    lost = len(answers) - answered
    return {"clients": 16, "answered": answered, "lost": lost, "up_s": up_s, "down_s": down_s}


def until(count: int) -> float:
    """Seconds until there are so many replicas."""
    started = time.monotonic()
    while running() != count:
        if time.monotonic() - started > 2 * LOAD_S:
            raise RuntimeError(f"{running()} replicas after {2 * LOAD_S} s, not {count}")
        time.sleep(0.1)
    return time.monotonic() - started


def main() -> None:
    parser = rows.Parser(__doc__, "serving.csv")
    parser.some("--questions", "what to do", ("killed", "scaled"))
    parser.flag("--total", "requests", 1500)
    parser.flag("--rate", "requests per second", 100.0)
    arguments = parser.parse()
    place = Address()
    with tempfile.TemporaryDirectory() as name:
        service = images(Path(name))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        for question in arguments.questions:
            replicas = (2, 2) if question == "killed" else (1, 2)
            ongoing = 16 if question == "killed" else 4
            settings, names = Settings(threads=1), [service.name]
            application = ours.deployment(
                [service.path], names, settings, replicas, ongoing, DELAYS
            )
            ours.run(application, "127.0.0.1", place.port, blocking=False)
            load(place, service.requests, total=50)
            if question == "killed":
                found = killed_under_load(service, place, arguments.total, arguments.rate)
            else:
                found = scaled_by_load(service, place)
            about: Row = {"question": f"replica {question}", "engine": "quantize on Ray Serve"}
            row = about | {"model": service.name} | found | rows.host()
            rows.write(arguments.out, [row], ("question", "engine", "model", "clients"))
            serve.delete(ours.NAME)
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
