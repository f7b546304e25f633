"""How long waiting threads should look before they sleep, on a free and on a loaded machine.

    uv run python benchmarks/threads.py  # a quarter of an hour; nothing else should run
    uv run python benchmarks/threads.py --loads 0 --rounds 2

A thread of libgomp that comes to a barrier looks GOMP_SPINCOUNT times for the others before it
sleeps: 300,000 times if nobody says otherwise. Every setting (spin count, number of threads) has
processes of its own, because libgomp reads the count when torch is imported. The processes take
turns, one computing at a time, without other load and with as many endless loops beside them as
--loads says. The work is what this package's scripts do: a forward pass of the default decoder over
8 x 256 tokens and over one token, a training step, decoding in C++ (int8), and a convolutional
network on one image.

Rows go to benchmarks/results/threads.csv: milliseconds per call (median and 90th percentile), the
CPU milliseconds that all threads of the process spent on it, and `over_best`, the time over that of
the best setting for this work and load. The setting to choose has the smallest worst `over_best`,
which is printed at the end.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from unittest import mock

import rows
import torch

from quantize import ConvNet, ConvNetConfig, DecoderConfig, DecoderLM, KVCache, quantize_dynamic
from quantize.host import usable_cores
from quantize.measuring import Build
from quantize.measuring.nursery import Nursery
from quantize.measuring.process import Worker, pack, payload
from quantize.measuring.result import latency_of
from quantize.run.decoding import for_decoding
from quantize.training import next_token_loss

DECODER = DecoderConfig(width=128, layers=6, heads=2, qk_norm=True, max_length=1024)  # train.py's
WORKS = ("forward 8 x 256", "forward 1 x 1", "image", "decode 32 tokens", "training step")
DEFAULT = "300000"  # libgomp's own
COUNTS = ["0", "300", "1000", "3000", "10000", "100000", DEFAULT]
LOOP = "while True: pass"
TICK_MS = 1000 / os.sysconf("SC_CLK_TCK")


def work(name: str) -> Callable[[torch.Tensor], object]:
    """What is timed, called on ids [8, 256]; made in the process that measures."""
    torch.manual_seed(0)
    decoder = DecoderLM(DECODER)
    if name == "training step":
        return lambda ids: train_step(decoder, ids)
    if name == "image":
        net = ConvNet(ConvNetConfig(widths=(64, 128), blocks=2)).eval()
        image = torch.rand(1, net.config.in_channels, 28, 28)
        return lambda _: net(image)
    if name == "decode 32 tokens":
        ready = for_decoding(quantize_dynamic(decoder.eval()))
        return lambda ids: decode_32(ready, ids[:1])
    decoder.eval()
    return decoder if name == "forward 8 x 256" else lambda ids: decoder(ids[:1, :1])


def decode_32(decoder: torch.nn.Module, ids: torch.Tensor) -> None:
    cache = KVCache.for_model(decoder, limit=64)
    decoder(ids[:, :32], cache)
    for _ in range(32):
        decoder(ids[:, :1], cache)


@torch.enable_grad()
def train_step(decoder: torch.nn.Module, ids: torch.Tensor) -> None:
    next_token_loss(decoder, (ids, ids)).backward()
    decoder.zero_grad()


@dataclass
class Setting:
    """A spin count and a number of threads, with a process per work."""

    count: str
    threads: int
    workers: dict[str, Worker]

    def run(self, name: str, seconds: float) -> tuple[list[float], float]:
        """Milliseconds of each call, and the CPU milliseconds of all of them."""
        worker = self.workers[name]
        before = cpu_ms(worker.pid)
        times = worker.burst(seconds)
        return times, cpu_ms(worker.pid) - before


def cpu_ms(pid: int) -> float:
    """CPU milliseconds of a process so far."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return TICK_MS * (int(after_name[11]) + int(after_name[12]))  # user, system


def start(stack: ExitStack, count: str, threads: int) -> Setting:
    """The processes of a setting, warmed up; `stack` ends them."""
    with mock.patch.dict(os.environ, {"GOMP_SPINCOUNT": count}):
        nursery = stack.enter_context(Nursery(threads=threads))
    ids = torch.randint(0, DECODER.vocab_size, (8, 256))
    workers = {}
    for name in WORKS:
        things = {"example_inputs": pack(ids), "source": pack(Build(lambda n=name: work(n)))}
        options = {"name": name, "keep": True, "timeout_s": 600.0}
        worker = stack.enter_context(Worker(nursery, None, payload(**things), **options))
        worker.load()
        worker.warm_up()
        workers[name] = worker
    return Setting(count, threads, workers)


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


def compare(
    settings: list[Setting], loops: int, name: str, rounds: int, seconds: float
) -> list[rows.Row]:
    """A row per setting, of one work under one load."""
    turns = []
    with load(loops):
        for _ in range(rounds):
            turns.append([setting.run(name, seconds) for setting in settings])
    found = []
    for setting, runs in zip(settings, zip(*turns, strict=True), strict=True):
        time = latency_of([times for times, _ in runs])
        row = {"load": loops, "work": name}
        row |= {"threads": setting.threads, "spin_count": setting.count}
        row |= {"ms": time.median, "p90": time.p90}
        # of one more call a turn: the first one isn't counted
        busy = sum(ms for _, ms in runs) / (time.calls + rounds)
        found.append(row | {"cpu_ms": busy})
    best = min(row["ms"] for row in found)
    about = {name: value for name, value in rows.host().items() if name != "threads"}
    return [row | {"over_best": row["ms"] / best} | about for row in found]


def main() -> None:
    parser = rows.Parser(__doc__, "threads.csv")
    parser.flag("--counts", "spin counts", COUNTS)
    parser.flag("--loads", "endless loops beside us", [0, 8])
    parser.flag("--rounds", "turns of each setting", 5)
    parser.flag("--seconds", "length of a turn", 0.5)
    arguments = parser.parse()
    found: list[rows.Row] = []
    with ExitStack() as stack:
        settings = [start(stack, count, usable_cores()) for count in arguments.counts]
        settings.append(start(stack, DEFAULT, 1))
        for loops, name in product(arguments.loads, WORKS):
            found += compare(settings, loops, name, arguments.rounds, arguments.seconds)
            rows.write(arguments.out, found)
    print("worst over_best, by threads and count:")
    worst: dict[tuple[int, str], float] = {}
    for row in found:
        key = (row["threads"], row["spin_count"])
        worst[key] = max(worst.get(key, 1.0), row["over_best"])
    for (threads, count), value in worst.items():
        print(f"{threads}\t{count}\t{value:.2f}")


if __name__ == "__main__":
    main()
