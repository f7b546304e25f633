"""What serving costs over the library itself, and how much of it many clients get.

    uv run python benchmarks/serving.py
    uv run python benchmarks/serving.py --questions streams --shapes 135M

Questions:

- overhead: one client, one request at a time, against the library's own call on the same inputs, in
  turns. `overhead_ms` is the difference of medians. `paused_ms` is that call after pauses as long
  as this difference, in which caches and threads cool down as they do between requests.
- crowd: 64 clients that each wait for their answer, against the library with its best batch
  (`share`); then requests at 80% of that rate, whenever earlier ones are answered (`p99_over_p50`).
  `server_cpu_ms` is the CPU that the server's processes took for a request, model included,
  `load_cpu_ms` that of the load generator, which shares the cores with them.
- floor: the same one client and the same 80% against a server that answers at once: what the load
  generator and the kernel add to every other row.
- streams: 1, 4 and 16 clients that let a decoder write, each its own prompt: tokens per second in
  all, time to the first token, time per token.
- memory: what one and four workers hold, shared pages counted once.
- flat: the memory of a worker before and after 20,000 requests.
- burst: 10,000 requests at once: how many were answered, how many refused, none without an answer.

The load comes from a process of its own (load.py), the server is `quantize serve`. Rows go to
benchmarks/results/serving.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rows
from rows import Row, host
from services import (
    PHOTO,
    Server,
    Service,
    decoder,
    embeddings,
    images,
    load,
    milliseconds,
    per_second,
    photos,
    serve,
)

from quantize import clock

QUESTIONS = ("overhead", "crowd", "floor", "streams", "memory", "flat", "burst")
MODELS = {"cnn": images, "encoder": embeddings, "resnet18": photos}
NOTHING = Path(__file__).with_name("serving_nothing.py")
KEY = ("question", "engine", "model", "clients")
CLIENTS = 64
NEW = 64  # tokens of a stream


def overhead(service: Service, server: Server, total: int, name: str) -> Row:
    """One client against the library's own call, in turns."""
    ours, theirs, paused = [], [], []
    load(server, service.requests, total=10)
    numbers = iter(range(10**9))
    for turn in range(4):
        start = turn * 16 % len(service.requests)
        answers = load(server, service.requests[start:], total=total)
        ours += milliseconds(answers, name)
        theirs += [1000 * s for s in clock.burst(lambda: service.call(next(numbers)), 0.5)]
        pause_ms = max(0.0, statistics.median(ours) - statistics.median(theirs))
        for _ in range(total):
            time.sleep(pause_ms / 1000)
            paused.append(1000 * clock.timed(lambda: service.call(next(numbers)))[1])
    medians = statistics.median(ours), statistics.median(theirs)
    return {
        "median_ms": medians[0],
        "library_ms": medians[1],
        "paused_ms": statistics.median(paused),
        "overhead_ms": medians[0] - medians[1],
        "p99_ms": _percentile(ours, 99),
    }


def _percentile(values: list[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def best_batch(service: Service) -> tuple[int, float]:
    """The batch with which the library answers most per second, and how many those are."""

    def rate(count: int) -> float:
        starts = itertools.count(0, count)
        times = clock.burst(lambda: service.call(next(starts), count), 0.5)
        return count / statistics.mean(times)  # inputs differ in length

    rates = {count: rate(count) for count in (1, 2, 4, 8, 16, 32, 64)}
    best = max(rates, key=lambda count: rates[count])
    return best, rates[best]


def crowd(service: Service, server: Server, total: int) -> Iterator[Row]:
    """Many clients against the library with its best batch, then 80% of that load."""
    load(server, service.requests, clients=CLIENTS, total=total // 4)
    shares, rate = [], 0.0
    for _ in range(3):
        batch, library = best_batch(service)
        before = server.cpu_s()
        answers = load(server, service.requests, clients=CLIENTS, total=total)
        milliseconds(answers)
        rate, cpu_s = per_second(answers), server.cpu_s() - before
        shares.append(rate / library)
        yield {
            "clients": CLIENTS,
            "per_second": rate,
            "library_per_second": library,
            "library_batch": batch,
            "share": statistics.median(shares),
            "server_cpu_ms": 1000 * cpu_s / len(answers),
            "load_cpu_ms": _load_cpu_ms(answers),
        }
    yield at_a_rate(service, server, total, 0.8 * rate)


def _load_cpu_ms(answers: list[dict[str, Any]]) -> float:
    """CPU of the load generator for a request: between its first answer and its last."""
    taken = [answer["cpu_s"] for answer in answers]
    return 1000 * (max(taken) - min(taken)) / len(answers)


def at_a_rate(service: Service, server: Server, total: int, rate: float) -> Row:
    """Requests that are sent whether or not earlier ones were answered."""
    steady = load(server, service.requests, clients=CLIENTS, total=total, rate=rate)
    served = [answer for answer in steady if answer["status"] != 503]
    times = milliseconds(served)
    p50, p99 = statistics.median(times), _percentile(times, 99)
    refused = len(steady) - len(served)
    about: Row = {"clients": "80%", "per_second": per_second(steady), "refused": refused}
    return about | {"median_ms": p50, "p99_ms": p99, "p99_over_p50": p99 / p50}


def floor(service: Service, total: int) -> Iterator[Row]:
    """The load generator against a server that answers at once."""
    with Server([sys.executable, str(NOTHING)]) as server:
        one = milliseconds(load(server, service.requests, total=total))
        found = {"median_ms": statistics.median(one), "p99_ms": _percentile(one, 99)}
        yield {"clients": 1, **found}
        yield at_a_rate(service, server, total, 1000)


def streams(service: Service, server: Server, clients: int, new: int) -> Row:
    """So many clients, each of whom gets one text."""
    load(server, service.requests[-clients:], clients=clients, total=clients)
    answers = load(server, service.requests[:clients], clients=clients, total=clients)
    first = statistics.median(milliseconds(answers, "first_s"))
    whole = statistics.median(milliseconds(answers))
    return {
        "clients": clients,
        "tokens_s": new * per_second(answers),
        "first_token_ms": first,
        "ms_per_token": (whole - first) / (new - 1),
    }


def memory(service: Service, arguments: argparse.Namespace) -> Iterator[Row]:
    """Of one worker and of four, after each has answered."""
    for workers in (1, 4):
        with serve(arguments, service.path, "--workers", str(workers)) as server:
            load(server, service.requests, clients=16, total=32)
            yield {"clients": workers, "memory_mb": server.memory_mb()}


def flat(service: Service, arguments: argparse.Namespace, total: int) -> Row:
    """Memory before and after many requests."""
    with serve(arguments, service.path) as server:
        load(server, service.requests, clients=16, total=2000)
        before = server.memory_mb()
        load(server, service.requests, clients=16, total=total, limit_s=100)
        return {"clients": 16, "before_mb": before, "memory_mb": server.memory_mb()}


def burst(service: Service, server: Server, total: int) -> Row:
    """All at once: each gets an answer, some of them a 503."""
    answers = load(server, service.requests, clients=total, total=total, limit_s=60)
    counts = dict.fromkeys((200, 503), 0)
    for answer in answers:
        counts[answer["status"]] = counts.get(answer["status"], 0) + 1
    load(server, service.requests, total=10)
    lost = len(answers) - counts[200] - counts[503]
    return {"clients": total, "answered": counts[200], "refused": counts[503], "lost": lost}


def found_rows(arguments: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """The rows of the questions that were asked."""
    asked = set(arguments.questions)
    for make in [MODELS[name] for name in arguments.models]:
        if not asked & {"overhead", "crowd", "burst", "flat"}:
            break
        service = make(folder)
        named = {"engine": "quantize", "model": service.name}
        flags = ("--inputs", str(folder / PHOTO)) if make is photos else ()
        with serve(arguments, service.path, *flags) as server:
            if "overhead" in asked:
                found = overhead(service, server, arguments.total // 8, "end_s")
                yield {"question": "overhead", **named, "clients": 1, **found}
            if "crowd" in asked:
                for found in crowd(service, server, arguments.total):
                    yield {"question": "crowd", **named, **found}
            if "burst" in asked:
                yield {"question": "burst", **named, **burst(service, server, 10_000)}
        if "flat" in asked and make is images:
            yield {"question": "flat", **named, **flat(service, arguments, 20_000)}
    if "floor" in asked:
        for found in floor(images(folder), arguments.total):
            yield {"question": "floor", "engine": "nothing", "model": "cnn", **found}
    for shape in arguments.shapes:
        if asked & {"overhead", "streams", "memory"}:
            yield from _rows_of_a_decoder(arguments, folder, shape, asked)


def _rows_of_a_decoder(
    arguments: argparse.Namespace, folder: Path, shape: str, asked: set[str]
) -> Iterator[Row]:
    named = {"engine": "quantize int8", "model": shape}
    make = decoder(folder, shape)
    service, first = make(NEW), make(1)
    flags = ("--name", shape)
    with contextlib.ExitStack() as stack:
        if asked & {"overhead", "streams"}:
            server = stack.enter_context(serve(arguments, service.path, *flags))
        if "overhead" in asked:
            found = overhead(first, server, 8, "first_s")
            yield {"question": "overhead", **named, "clients": 1, **found}
        for clients in (1, 4, 16) if "streams" in asked else ():
            found = streams(service, server, clients, NEW)
            yield {"question": "streams", **named, **found}
    if "memory" in asked:
        for found in memory(service, arguments):
            yield {"question": "memory", **named, **found}


def main() -> None:
    parser = rows.Parser(__doc__, "serving.csv")
    parser.some("--questions", "what to measure", QUESTIONS)
    parser.some("--models", "that aren't decoders", MODELS, tuple(MODELS)[:2])
    parser.some("--shapes", "of the decoder", ("30M", "135M"), ("135M",))
    parser.flag("--total", "requests of a measurement", 1600)
    arguments = parser.parse()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        for row in found_rows(arguments, Path(name)):
            rows.write(arguments.out, [row | host()], KEY)


if __name__ == "__main__":
    main()
