"""Other servers beside ours, on the same artifacts and under the same load.

    uv run --group bench --with litserve python benchmarks/serving_peers.py

- LitServe with the CNN (litserve_images.py): a worker of one thread for each of the threads. The
  questions are `overhead` and `crowd` of serving.py, asked of both servers, one after the other.
  Its idle workers look for work all the time, which slows the library's calls in turns with them:
  its rows lack what is compared with those.
- llama.cpp's server (of the package xllamacpp) with q8_0, ours with int8: 1, 4 and 16 `streams`, in
  turns.

Rows go to benchmarks/results/serving.csv.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import llama
import rows
import torch
from decoding import build
from rows import Row, host
from services import PROMPT, Server, Service, decoder, images, post, serve
from serving import KEY, NEW, crowd, overhead, streams

from quantize.run.serve.datatypes import to_bytes

HERE = Path(__file__).parent
SHAPE = "135M"
STARTS_S = 60
OF_LIBRARY = (
    "library_ms",
    "paused_ms",
    "overhead_ms",
    "library_per_second",
    "library_batch",
    "share",
)


class Group(Server):
    """A server that leads a group of processes, which end with it."""

    def __exit__(self, *error: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)


def litserve(service: Service, workers: int) -> Server:
    """LitServe with a service's artifact."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = str(HERE / "litserve_images.py")
    command = [sys.executable, file, str(service.path), str(port), str(workers)]
    server = Group(command)
    end = time.monotonic() + STARTS_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://{server.address}/health")  # 503 until models are loaded
            return server
        time.sleep(0.2)
    server.__exit__()
    raise RuntimeError("LitServe didn't start")


def for_litserve(service: Service) -> Service:
    """The same images, in LitServe's form."""
    torch.manual_seed(1)
    bodies = [base64.b64encode(to_bytes(image)).decode() for image in torch.randn(256, 1, 28, 28)]
    requests = [post("/predict", {"image": body}) for body in bodies]
    return replace(service, requests=requests)


def rows_of_images(arguments: argparse.Namespace, folder: Path) -> Iterator[Row]:
    ours = images(folder)
    servers = {"quantize": (ours, lambda: serve(arguments, ours.path))}
    servers["LitServe"] = for_litserve(ours), lambda: litserve(ours, arguments.threads)
    for engine, (service, start) in servers.items():
        named = {"engine": engine, "model": service.name}
        with start() as server:
            found = overhead(service, server, arguments.total // 8, "end_s")
            answers = [{"question": "overhead", "clients": 1, **found}]
            for row in crowd(service, server, arguments.total):
                answers.append({"question": "crowd", **row})
        for row in answers:
            yield named | (row if engine == "quantize" else without_library(row))


def without_library(row: Row) -> Row:
    return {name: row[name] for name in row if name not in OF_LIBRARY}


def for_llama(service: Service) -> Service:
    """Prompts of as many tokens, in the form of llama.cpp's server."""
    torch.manual_seed(1)
    content = {"max_tokens": NEW, "temperature": 0, "stream": True}
    content |= {"ignore_eos": True, "cache_prompt": False}
    prompts = torch.randint(2, 4096, (64, PROMPT)).tolist()
    requests = [post("/v1/completions", {**content, "prompt": ids}) for ids in prompts]
    return replace(service, requests=requests)


def rows_of_texts(arguments: argparse.Namespace, folder: Path) -> Iterator[Row]:
    ours = decoder(folder, SHAPE)(NEW)
    theirs, path = for_llama(ours), folder / "q8_0.gguf"
    llama.write_gguf(build(SHAPE), path, "q8_0")
    flags = [str(HERE / "llama.py"), str(path), "16", str(PROMPT + NEW)]
    with (
        serve(arguments, ours.path, "--name", SHAPE) as server,
        Server([sys.executable, *flags]) as other,
    ):
        for clients in (1, 4, 16):
            for engine, service, at in (
                ("quantize int8", ours, server),
                ("llama.cpp q8_0 (xllamacpp wheel)", theirs, other),
            ):
                found = streams(service, at, clients, NEW)
                yield {"question": "streams", "engine": engine, "model": SHAPE, **found}


def main() -> None:
    parser = rows.Parser(__doc__, "serving.csv")
    parser.some("--peers", "which", ("LitServe", "llama.cpp"))
    parser.flag("--total", "requests of a measurement", 1600)
    arguments = parser.parse()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    made = {"LitServe": rows_of_images, "llama.cpp": rows_of_texts}
    with tempfile.TemporaryDirectory() as folder:
        for peer in arguments.peers:
            for row in made[peer](arguments, Path(folder)):
                rows.write(arguments.out, [row | host()], KEY)


if __name__ == "__main__":
    main()
