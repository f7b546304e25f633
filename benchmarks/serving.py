"""What serving costs over the library itself, and how much of it many clients get.

    uv run python benchmarks/serving.py
    uv run python benchmarks/serving.py --questions streams --shapes 135M

Questions:

- overhead: one client, one request at a time, against the library's own call on the same inputs, in
  turns. `overhead_ms` is the difference of medians.
- crowd: 64 clients that each wait for their answer, against the library with its best batch
  (`share`); then requests at 80% of that rate, whenever earlier ones are answered (`p99_over_p50`).
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
import base64
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rows
import torch
from decoding import build
from models import small_bert
from rows import Row, host
from tokenizers import Tokenizer, models, pre_tokenizers

import quantize
from quantize import clock
from quantize.models import ConvNet, ConvNetConfig
from quantize.run.generate import generate
from quantize.run.serve.batching import Job
from quantize.run.serve.datatypes import to_bytes
from quantize.run.serve.encoder import Encoder

LOAD = Path(__file__).with_name("load.py")
QUESTIONS = ("overhead", "crowd", "streams", "memory", "flat", "burst")
KEY = ("question", "engine", "model", "clients")
CLIENTS = 64
NEW, PROMPT = 64, 32  # tokens of a stream
VOCABULARY = 4096  # of the encoder


@dataclass
class Service:
    """Something that is served, and the same thing as a call of the library.

    Args:
        name: of the model.
        path: what is served.
        requests: whole HTTP requests.
        call: the library's call for request number i.
        batched: the library's call for the first so many requests at once; None: no such thing.
    """

    name: str
    path: Path
    requests: list[bytes]
    call: Callable[[int], Any]
    batched: Callable[[int], Any] | None = None


def http(path: str, body: bytes, **headers: object) -> bytes:
    """A whole request."""
    lines = [f"POST {path} HTTP/1.1", "Host: benchmark", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def post(path: str, content: object) -> bytes:
    return http(path, json.dumps(content).encode(), Content_Type="application/json")


def images(folder: Path) -> Service:
    """A small CNN, asked with binary tensors."""
    torch.manual_seed(0)
    model = ConvNet(ConvNetConfig()).eval()
    quantize.save(model, folder / "cnn.safetensors")
    inputs = torch.randn(256, 1, 28, 28)

    def request(x: torch.Tensor) -> bytes:
        data = to_bytes(x)
        port = {"name": "images", "datatype": "FP32", "shape": list(x.shape)}
        entry = {**port, "parameters": {"binary_data_size": len(data)}}
        content = {"inputs": [entry], "parameters": {"binary_data_output": True}}
        head = json.dumps(content).encode()
        sizes = {"Inference-Header-Content-Length": len(head)}
        return http("/v2/models/cnn/infer", head + data, **sizes)

    def call(start: int, count: int = 1) -> torch.Tensor:
        with torch.no_grad():
            return model(inputs[start % len(inputs) :][:count])

    requests = [request(x[None]) for x in inputs]
    path = folder / "cnn.safetensors"
    return Service("cnn", path, requests, call, lambda count: call(0, count))


def write_words(folder: Path, size: int) -> None:
    """A tokenizer whose words are w0, w1, ..."""
    words = {f"w{i}": i for i in range(size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def sentences(count: int, low: int, high: int, size: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(count):
        length = int(torch.randint(low, high + 1, (), generator=generator))
        ids = torch.randint(1, size, (length,), generator=generator).tolist()
        texts.append(" ".join(f"w{i}" for i in ids))
    return texts


def embeddings(folder: Path) -> Service:
    """An encoder of 6 layers of width 384, asked for vectors of sentences of 8 to 48 words."""
    from transformers import BertModel

    torch.manual_seed(0)
    config: Any = small_bert(384, 6).config
    config.vocab_size, config.num_attention_heads = VOCABULARY, 12
    model = BertModel(config).eval()
    place = folder / "encoder"
    quantize.save_folder(model, place)
    write_words(place, VOCABULARY)
    texts = sentences(256, 8, 48, VOCABULARY)
    encoder = Encoder(model, place)

    def call(start: int, count: int = 1) -> Any:
        encoded = [encoder.encode(texts[(start + i) % len(texts)]) for i in range(count)]
        encoded.sort(key=lambda each: len(each[0]))
        return encoder.run([Job(each, 1, len(each[0]), done=None) for each in encoded])

    content = [{"model": "encoder", "input": text} for text in texts]
    requests = [post("/v1/embeddings", each) for each in content]
    return Service("encoder", place, requests, call, lambda count: call(0, count))


def decoder(folder: Path, shape: str) -> Callable[[int], Service]:
    """A decoder in int8; gives the service that streams so many tokens to prompts of its own."""
    model: Any = quantize.quantize_dynamic(build(shape), prefer="size")
    place = folder / shape
    quantize.save_folder(model, place)
    size = model.config.vocab_size
    write_words(place, size)
    texts = sentences(64, PROMPT, PROMPT, size)

    def service(new: int) -> Service:
        def call(number: int) -> Any:
            ids = torch.tensor([[int(word[1:]) for word in texts[number % len(texts)].split()]])
            return generate(model, ids, max_new_tokens=new)

        content = {"model": shape, "max_tokens": new, "temperature": 0, "stream": True}
        requests = [post("/v1/completions", {**content, "prompt": text}) for text in texts]
        return Service(shape, place, requests, call)

    return service


class Server:
    """`quantize serve`, under way."""

    def __init__(self, command: Sequence[str], ready: str = r"http://(\S+)") -> None:
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if address := re.search(ready, line):
                self.address = address[1]
                return
        raise RuntimeError("the server didn't start")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    def memory_mb(self) -> float:
        """What the process and its children hold, pages that they share counted once."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        total = 0
        for each in (str(pid), *children):
            text = Path(f"/proc/{each}/smaps_rollup").read_text()
            total += int(re.search(r"^Pss: +(\d+)", text, re.MULTILINE)[1])  # type: ignore[index]
        return total / 1024


def serve(arguments: argparse.Namespace, path: Path, *flags: str) -> Server:
    """Our server of one model."""
    threads = ["--threads", str(arguments.threads)]
    command = [sys.executable, "-m", "quantize", "serve", str(path), "--port", "0"]
    return Server([*command, *threads, *flags])


def load(
    server: Server,
    requests: list[bytes],
    *,
    clients: int = 1,
    total: int,
    rate: float | None = None,
    limit_s: float = 20,
) -> list[dict[str, Any]]:
    """Answers to requests from a process of their own."""
    encoded = [base64.b64encode(request).decode() for request in requests]
    job = {"address": server.address, "requests": encoded, "clients": clients, "total": total}
    job |= {"rate": rate, "limit_s": limit_s}
    command, text = [sys.executable, str(LOAD)], json.dumps(job)
    return json.loads(subprocess.check_output(command, input=text, text=True))


def milliseconds(answers: list[dict[str, Any]], name: str = "end_s") -> list[float]:
    good = [answer for answer in answers if answer["status"] == 200 and not answer["error"]]
    if len(good) < len(answers):
        raise RuntimeError(f"{len(answers) - len(good)} of {len(answers)} requests failed")
    return [1000 * answer[name] for answer in good]


def per_second(answers: list[dict[str, Any]]) -> float:
    """Answers per second, from the first request to the last answer."""
    return len(answers) / max(answer["start_s"] + answer["end_s"] for answer in answers)


def overhead(service: Service, server: Server, total: int, name: str) -> Row:
    """One client against the library's own call, in turns."""
    ours, theirs = [], []
    load(server, service.requests, total=10)
    numbers = iter(range(10**9))
    for turn in range(4):
        answers = load(server, service.requests[turn * 16 :], total=total)
        ours += milliseconds(answers, name)
        theirs += [1000 * s for s in clock.burst(lambda: service.call(next(numbers)), 0.5)]
    medians = statistics.median(ours), statistics.median(theirs)
    return {
        "median_ms": medians[0],
        "library_ms": medians[1],
        "overhead_ms": medians[0] - medians[1],
        "p99_ms": _percentile(ours, 99),
    }


def _percentile(values: list[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def best_batch(service: Service, seconds: float = 0.5) -> tuple[int, float]:
    """The batch with which the library answers most per second, and how many those are."""
    assert service.batched is not None
    rates = {}
    for count in (1, 2, 4, 8, 16, 32, 64):
        times = clock.burst(lambda count=count: service.batched(count), seconds)  # type: ignore
        rates[count] = count / statistics.median(times)
    best = max(rates, key=lambda count: rates[count])
    return best, rates[best]


def crowd(service: Service, server: Server, total: int) -> Iterator[Row]:
    """Many clients against the library with its best batch, then 80% of that load."""
    load(server, service.requests, clients=CLIENTS, total=total // 4)
    shares, rate = [], 0.0
    for _ in range(3):
        batch, library = best_batch(service)
        answers = load(server, service.requests, clients=CLIENTS, total=total)
        milliseconds(answers)
        rate = per_second(answers)
        shares.append(rate / library)
        yield {
            "clients": CLIENTS,
            "per_second": rate,
            "library_per_second": library,
            "library_batch": batch,
            "share": statistics.median(shares),
        }
    steady = load(server, service.requests, clients=CLIENTS, total=total, rate=0.8 * rate)
    served = [answer for answer in steady if answer["status"] != 503]
    times = milliseconds(served)
    p50, p99 = statistics.median(times), _percentile(times, 99)
    refused = len(steady) - len(served)
    about: Row = {"clients": "80%", "per_second": per_second(steady), "refused": refused}
    yield about | {"median_ms": p50, "p99_ms": p99, "p99_over_p50": p99 / p50}


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
    for make in (images, embeddings):
        if not asked & {"overhead", "crowd", "burst", "flat"}:
            break
        service = make(folder)
        named = {"engine": "quantize", "model": service.name}
        with serve(arguments, service.path) as server:
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
    parser.some("--shapes", "of the decoder", ("30M", "135M"), ("135M",))
    parser.flag("--total", "requests of a measurement", 1600)
    arguments = parser.parse()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        found = []
        for row in found_rows(arguments, Path(name)):
            found = [each for each in found if _key(each) != _key(row)] + [row | host()]
            rows.write(arguments.out, [row | host()], KEY)


def _key(row: Row) -> tuple:
    return tuple(row[name] for name in KEY)


if __name__ == "__main__":
    main()
