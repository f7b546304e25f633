"""Small models of every kind, and a server of them in a thread of the tests' own process."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import httpx
import uvicorn
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import quantize
from quantize.models import ConvNet, ConvNetConfig
from quantize.run.serve import Served, Settings, app
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


def net() -> ConvNet:
    """A small CNN."""
    return ConvNet(ConvNetConfig()).eval()


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
