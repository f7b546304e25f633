"""How long waiting threads should look before they sleep, on a free and on a loaded machine.

    uv run python benchmarks/threads.py  # a quarter of an hour; nothing else should run
    uv run python benchmarks/threads.py --loads 0 --rounds 2

A thread of libgomp that comes to a barrier looks GOMP_SPINCOUNT times for the others before it
sleeps: 300,000 times if nobody says otherwise. libgomp reads the count when torch is imported, so
every setting (spin count, number of threads) has a process of its own in each round. One computes
at a time, without other load and with as many endless loops beside it as --loads says. The work is
what this package's scripts do: a forward pass of the default decoder over 8 x 256 tokens and over
one token, a training step, decoding in C++ (int8), and a convolutional network on one image.

Rows go to benchmarks/results/threads.csv: milliseconds per call (median and 90th percentile), the
CPU milliseconds that all threads of the process spent on it, and `over_best`, the time over that of
the best setting for this work and load. The setting to choose has the smallest worst `over_best`,
which is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import rows
import torch

from quantize import (
    ConvNet,
    ConvNetConfig,
    DecoderConfig,
    DecoderLM,
    KVCache,
    clock,
    quantize_dynamic,
)
from quantize.host import usable_cores
from quantize.measuring.result import latency_of
from quantize.run.decoding import for_decoding
from quantize.training import next_token_loss

DECODER = DecoderConfig(width=128, layers=6, heads=2, qk_norm=True, max_length=1024)  # train.py's
DEFAULT = "300000"  # libgomp's own
COUNTS = ["0", "300", "1000", "3000", "10000", "100000", DEFAULT]
LOOP = "while True: pass"


def works() -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    torch.manual_seed(0)
    decoder, learner = DecoderLM(DECODER).eval(), DecoderLM(DECODER)
    net = ConvNet(ConvNetConfig(widths=(64, 128), blocks=2)).eval()
    ids = torch.randint(0, DECODER.vocab_size, (8, 256))
    image = torch.rand(1, net.config.in_channels, 28, 28)
    ready = for_decoding(quantize_dynamic(decoder, prefer="size"))

    def decode() -> None:
        cache = KVCache.for_model(ready, limit=64)
        ready(ids[:1, :32], cache)
        for _ in range(32):
            ready(ids[:1, :1], cache)

    @torch.enable_grad()
    def train() -> None:
        next_token_loss(learner, (ids, ids)).backward()
        learner.zero_grad()

    return {
        "forward 8 x 256": lambda: decoder(ids),
        "forward 1 x 1": lambda: decoder(ids[:1, :1]),
        "image": lambda: net(image),
        "decode 32 tokens": decode,
        "training step": train,
    }


@contextmanager
def load(count: int) -> Iterator[None]:
    """So many endless loops beside us."""
    loops = [subprocess.Popen([sys.executable, "-S", "-c", LOOP]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def work(loads: list[int], seconds: float) -> Iterator[rows.Row]:
    """Times of every work under every load: ms of each call, CPU ms of a call."""
    known = works()
    clock.race(list(known.values()), least=1)
    for loops in loads:
        with load(loops):
            for name, call in known.items():
                before = time.process_time()
                times = [1e3 * taken for taken in clock.burst(call, seconds)]
                calls = 1 + len(times)  # the first one isn't in `times`
                cpu_ms = 1e3 * (time.process_time() - before) / calls
                yield {"load": loops, "work": name, "times": times, "cpu_ms": cpu_ms}


def measure(count: str, threads: int, arguments: argparse.Namespace) -> list[rows.Row]:
    """What `work` gives in a process with this spin count."""
    names = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment["GOMP_SPINCOUNT"] = count
    flags = ("--worker", "--threads", threads, "--seconds", arguments.seconds)
    return rows.in_a_process(*flags, "--loads", *arguments.loads, environment=environment)


def main() -> None:
    parser = rows.Parser(__doc__, "threads.csv")
    parser.flag("--counts", "spin counts", COUNTS)
    parser.flag("--loads", "endless loops beside us", [0, 8])
    parser.flag("--rounds", "processes of each setting", 5)
    parser.flag("--seconds", "for each work, load and round", 0.5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse()
    if arguments.worker:
        for row in work(arguments.loads, arguments.seconds):
            print(json.dumps(row), flush=True)
        return
    settings = [*product(arguments.counts, [usable_cores()]), (DEFAULT, 1)]
    runs: dict[tuple, list[rows.Row]] = {}
    for _, (count, threads) in product(range(arguments.rounds), settings):
        for run in measure(count, threads, arguments):
            runs.setdefault((run["load"], run["work"], threads, count), []).append(run)
    rows.write(arguments.out, compared(runs))


def compared(runs: dict[tuple, list[rows.Row]]) -> list[rows.Row]:
    """A row per load, work and setting, beside the best setting of that load and work; prints the
    worst `over_best` of each setting.
    """
    about = {name: value for name, value in rows.host().items() if name != "threads"}
    found, best, worst = [], {}, {}
    for (loops, name, threads, count), mine in runs.items():
        latency = latency_of([run["times"] for run in mine])
        busy = sum(run["cpu_ms"] for run in mine) / len(mine)
        row = {"load": loops, "work": name, "threads": threads, "spin_count": count}
        found.append(row | {"ms": latency.median, "p90": latency.p90, "cpu_ms": busy})
        best[loops, name] = min(latency.median, best.get((loops, name), latency.median))
    for row in found:
        row["over_best"] = row["ms"] / best[row["load"], row["work"]]
        setting = (row["threads"], row["spin_count"])
        worst[setting] = max(row["over_best"], worst.get(setting, 1.0))
    for (threads, count), over in worst.items():
        print(f"worst over_best, {threads} threads, count {count}: {over:.2f}")
    return [row | about for row in found]


if __name__ == "__main__":
    main()
