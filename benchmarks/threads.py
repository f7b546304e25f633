"""How long waiting threads should look before they sleep, on a free and on a loaded machine.

    uv run python benchmarks/threads.py  # a quarter of an hour; nothing else should run
    uv run python benchmarks/threads.py --loads 0 --rounds 2

A thread of libgomp that comes to a barrier looks GOMP_SPINCOUNT times for the others before it
sleeps: 300,000 times if nobody says otherwise. Every setting (spin count, number of threads) has a
process of its own, because libgomp reads the count when torch is imported. The processes take
turns, one computing at a time, without other load and with as many endless loops beside them as
--loads says. The work is what this package's scripts do: a forward pass of the default decoder over
8 x 256 tokens and over one token, a training step, a decoding step in C++ (int8), and a
convolutional network on one image.

Rows go to benchmarks/results/threads.csv: milliseconds per call (median and 90th percentile), the
CPU milliseconds that all threads of the process spent on it, and `over_best`, the time over that of
the best setting for this work and load. The setting to choose has the smallest worst `over_best`,
which is printed at the end.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from quantize import ConvNet, ConvNetConfig, DecoderConfig, DecoderLM, KVCache, quantize_dynamic
from quantize.host import keep_allocations, machine, usable_cores
from quantize.run.decoding import for_decoding
from quantize.training import next_token_loss

RESULT = Path(__file__).parent / "results" / "threads.csv"
DECODER = DecoderConfig(width=128, layers=6, heads=2, qk_norm=True, max_length=1024)  # train.py's
WORKS = ("forward 8 x 256", "forward 1 x 1", "image", "decode 32 tokens", "training step")
DEFAULT = "default"
COUNTS = ("0", "300", "1000", "3000", "10000", "100000", DEFAULT)
LOOP = "while True: pass"


# ------------------------------------------------------------------------------------- a measured
# process


def works() -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    torch.manual_seed(0)
    decoder, learner = DecoderLM(DECODER).eval(), DecoderLM(DECODER)
    image_net = ConvNet(ConvNetConfig(widths=(64, 128), blocks=2)).eval()
    ids = torch.randint(0, DECODER.vocab_size, (8, 256))
    image = torch.rand(1, image_net.config.in_channels, 28, 28)
    ready = for_decoding(quantize_dynamic(decoder))

    def decode_32() -> None:
        cache = KVCache.for_model(ready, limit=64)
        ready(ids[:1, :32], cache)
        for _ in range(32):
            ready(ids[:1, :1], cache)

    def training_step() -> None:
        next_token_loss(learner, (ids, ids)).backward()
        learner.zero_grad()

    timed = (
        lambda: decoder(ids),
        lambda: decoder(ids[:1, :1]),
        lambda: image_net(image),
        decode_32,
    )
    return dict(zip(WORKS, [*map(torch.no_grad(), timed), training_step], strict=True))


def serve(threads: int) -> None:
    """Answer each line on standard input, "work seconds", with a JSON list of [ms, CPU ms] per
    call.
    """
    torch.set_num_threads(threads)
    keep_allocations()
    known = works()
    for work in known.values():
        work()
    print("ready", flush=True)
    for line in sys.stdin:
        name, _, seconds = line.strip().rpartition(" ")
        print(json.dumps(calls(known[name], float(seconds))), flush=True)


def calls(work: Callable[[], object], seconds: float) -> list[tuple[float, float]]:
    """Wall and CPU milliseconds of calls for about `seconds`, three at least, after one that isn't
    counted.
    """
    work()
    samples: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(samples) < 3 or time.perf_counter() - start < seconds:
        wall, busy = time.perf_counter(), time.process_time()
        work()
        samples.append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - busy)))
    return samples


# ------------------------------------------------------------------------------------------ the
# comparison


class Setting:
    """A process with a spin count and a number of threads."""

    def __init__(self, count: str, threads: int):
        self.count, self.threads = count, threads
        dropped = (
            "OMP_WAIT_POLICY",
            "GOMP_SPINCOUNT",
            "KMP_BLOCKTIME",
            "OMP_NUM_THREADS",
            "MKL_NUM_THREADS",
        )
        environment = {name: value for name, value in os.environ.items() if name not in dropped}
        environment |= {} if count == DEFAULT else {"GOMP_SPINCOUNT": count}
        command = [sys.executable, __file__, "--serve", str(threads)]
        self.process = subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True)
        self.expect()

    def expect(self) -> str:
        """Its next line."""
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"threads.py: the process for a count of {self.count} has ended")
        return line

    def run(self, work: str, seconds: float) -> list[tuple[float, float]]:
        self.process.stdin.write(f"{work} {seconds}\n")
        self.process.stdin.flush()
        return json.loads(self.expect())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def load(count: int):
    """So many endless loops beside us."""
    loops = [subprocess.Popen([sys.executable, "-S", "-c", LOOP]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def compare(settings: list[Setting], loads: list[int], rounds: int, seconds: float) -> list[dict]:
    """A row per load, work and setting."""
    rows = []
    for loops in loads:
        for work in WORKS:
            samples: dict[Setting, list] = {setting: [] for setting in settings}
            with load(loops):
                for _ in range(rounds):
                    for setting in settings:
                        samples[setting] += setting.run(work, seconds)
            found = [row(setting, loops, work, samples[setting]) for setting in settings]
            best = min(entry["ms"] for entry in found)
            rows += [entry | {"over_best": entry["ms"] / best} for entry in found]
            for entry in rows[-len(found) :]:
                print(
                    *(f"{v:.3g}" if isinstance(v, float) else v for v in entry.values()),
                    sep="\t",
                    flush=True,
                )
    return rows


def row(setting: Setting, loops: int, work: str, samples: list[tuple[float, float]]) -> dict:
    walls = sorted(wall for wall, _ in samples)
    return {
        "load": loops, "work": work, "threads": setting.threads, "spin_count": setting.count,
        "ms": statistics.median(walls), "p90": walls[int(0.9 * len(walls))],
        "cpu_ms": statistics.median(busy for _, busy in samples),
    }  # fmt: skip


def write(rows: list[dict]) -> None:
    host = machine()
    with RESULT.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "cores", "torch", "cpu"])
        writer.writeheader()
        for entry in rows:
            rounded = {
                name: round(value, 4) if isinstance(value, float) else value
                for name, value in entry.items()
            }
            writer.writerow(
                rounded
                | {"cores": host["usable_cores"], "torch": host["torch"], "cpu": host["cpu"]}
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--counts", nargs="+", default=list(COUNTS), help="spin counts (default: %(default)s)"
    )
    parser.add_argument(
        "--loads",
        nargs="+",
        type=int,
        default=[0, 8],
        help="endless loops beside us (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns of each setting (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="length of a turn (default: %(default)s)"
    )
    parser.add_argument("--serve", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    with ExitStack() as stack:
        settings = []
        for threads, counts in ((usable_cores(), arguments.counts), (1, [DEFAULT])):
            for count in counts:
                settings.append(Setting(count, threads))
                stack.callback(settings[-1].close)
        rows = compare(settings, arguments.loads, arguments.rounds, arguments.seconds)
    write(rows)
    print("worst over_best, by threads and count:")
    for setting in settings:
        key = setting.threads, setting.count
        mine = [
            entry["over_best"] for entry in rows if (entry["threads"], entry["spin_count"]) == key
        ]
        print(f"{setting.threads}\t{setting.count}\t{max(mine):.2f}")


if __name__ == "__main__":
    main()
