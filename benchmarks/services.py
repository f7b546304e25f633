"""What the benchmarks of serving serve, and the load on it: a CNN, an encoder and a decoder, each
beside the same thing as a call of the library.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decoding import build
from models import classifier, pixels, small_bert
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import quantize
from quantize.models import ConvNet, ConvNetConfig
from quantize.run.generate import generate
from quantize.run.serve.datatypes import to_bytes
from quantize.run.serve.encoder import Encoder

LOAD = Path(__file__).with_name("load.py")
PHOTO = "photo.npy"  # example inputs
PROMPT = 32  # tokens of a prompt
VOCABULARY = 4096  # of the encoder


@dataclass
class Service:
    """Something that is served, and the same thing as a call of the library.

    Args:
        name: of the model.
        path: what is served.
        requests: whole HTTP requests.
        call: the library's call for request number i, and as many after it at once.
    """

    name: str
    path: Path
    requests: list[bytes]
    call: Callable[..., Any]


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
    path = folder / "cnn.safetensors"
    quantize.save(model, path)
    return of_tensors("cnn", path, model, "images", torch.randn(256, 1, 28, 28), 256)


def photos(folder: Path) -> Service:
    """ResNet-18 on images of 224 x 224."""
    torch.manual_seed(0)
    sizes: Any = {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
    model = classifier("ResNet", layer_type="basic", **sizes).eval()
    place, inputs = folder / "resnet18", pixels(64)
    quantize.save_folder(model, place)
    np.save(folder / PHOTO, inputs[:1].numpy())
    return of_tensors("resnet18", place, model, "pixel_values", inputs, 16)


def of_tensors(
    name: str, path: Path, model: nn.Module, port: str, inputs: torch.Tensor, asked: int
) -> Service:
    """A model that is asked with binary tensors: the first `asked` rows of `inputs`, one each."""

    def request(x: torch.Tensor) -> bytes:
        data = to_bytes(x)
        described = {"name": port, "datatype": "FP32", "shape": list(x.shape)}
        entry = {**described, "parameters": {"binary_data_size": len(data)}}
        content = {"inputs": [entry], "parameters": {"binary_data_output": True}}
        head = json.dumps(content).encode()
        sizes = {"Inference-Header-Content-Length": len(head)}
        return http(f"/v2/models/{name}/infer", head + data, **sizes)

    def call(start: int, count: int = 1) -> Any:
        with torch.no_grad():
            return model(inputs[start % len(inputs) :][:count])

    return Service(name, path, [request(x[None]) for x in inputs[:asked]], call)


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
        return encoder.answers(encoded)

    content = [{"model": "encoder", "input": text} for text in texts]
    requests = [post("/v1/embeddings", each) for each in content]
    return Service("encoder", place, requests, call)


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

    def processes(self) -> list[str]:
        """The process and its children."""
        pid = self.process.pid
        return [str(pid), *Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def cpu_s(self) -> float:
        """Seconds of CPU that they have taken."""
        total = 0
        for each in self.processes():
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(") ")[2].split()
            total += int(fields[11]) + int(fields[12])  # of user and of kernel
        return total / os.sysconf("SC_CLK_TCK")

    def memory_mb(self) -> float:
        """What they hold, pages that they share counted once."""
        total = 0
        for each in self.processes():
            text = Path(f"/proc/{each}/smaps_rollup").read_text()
            total += int(re.search(r"^Pss: +(\d+)", text, re.MULTILINE)[1])  # type: ignore[index]
        return total / 1024


def serve(arguments: argparse.Namespace, path: Path, *flags: str) -> Server:
    """Our server of one model, on as many cores as the benchmark has threads."""
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    command = [sys.executable, "-m", "quantize", "serve", str(path), "--port", "0"]
    return Server([*command, *flags])


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
