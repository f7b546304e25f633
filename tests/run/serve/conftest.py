"""A server of small models of every kind, in a thread of the tests' own process."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from helpers import decoder, seeded
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

import quantize
from quantize.models import ConvNet, ConvNetConfig
from quantize.native import build
from quantize.run.decoding.build import STEP
from quantize.run.serve import Served, Settings, app, open_served, serve_model
from quantize.run.serve.workers import listen

SPECIAL = ["[PAD]", "[UNK]", "<|end|>", "user:", "assistant:"]
WORDS = [*SPECIAL, *"the a cat dog sat ran on mat".split()]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant:"


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of a few words, and a chat template."""
    words = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "eos_token": {"content": "<|end|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_folder(folder: Path, model: nn.Module) -> Path:
    """A folder of a model with a tokenizer."""
    quantize.save_folder(model, folder)
    write_tokenizer(folder)
    return folder


class Running:
    """A server under way: its address, and the models by name."""

    def __init__(self, models: list[Served], settings: Settings) -> None:
        self.models = {served.name: served for served in models}
        listener = listen("127.0.0.1", 0)
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(app(models, settings), log_config=None, access_log=False)
        self.server = uvicorn.Server(config)
        run = {"sockets": [listener]}
        self._thread = threading.Thread(target=self.server.run, kwargs=run, daemon=True)
        self._thread.start()
        self.client = httpx.Client(base_url=f"http://{self.address}", timeout=30)
        while not self.server.started:
            self._thread.join(0.01)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    def numbers(self, metric: str, model: str) -> float:
        """A metric's value."""
        start = f'{metric}{{model="{model}"}} '
        lines = self.client.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(start)).removeprefix(start))


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Models: `net` and `net8` (images), `lm` and `lm8` (bytes), `chat` (words), `bert` (vectors),
    `cross` (scores).
    """
    build.library(STEP)
    folder = tmp_path_factory.mktemp("served")
    net = seeded(lambda: ConvNet(ConvNetConfig()))
    lm = decoder(vocab_size=256, max_length=1200)
    words = decoder(vocab_size=len(WORDS), max_length=256, eos_token_id=2)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(WORDS), intermediate_size=48, **small)
    scores = BertConfig(vocab_size=len(WORDS), intermediate_size=48, num_labels=1, **small)
    bert = seeded(lambda: BertModel(config))
    cross = seeded(lambda: BertForSequenceClassification(scores))
    mlp = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    served = [
        serve_model(net, "net"),
        serve_model(quantize.quantize_dynamic(mlp), "mlp8", None, torch.randn(1, 64)),
        serve_model(lm, "lm"),
        serve_model(quantize.quantize_dynamic(lm, embeddings=True), "lm8"),
        open_served(write_folder(folder / "chat", words), "chat"),
        open_served(write_folder(folder / "bert", bert), "bert"),
        open_served(write_folder(folder / "cross", cross), "cross"),
    ]
    with Running(served, Settings(max_body=1 << 20)) as server:
        yield server
