"""A server of small models of every kind, for all tests of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import decoder, seeded
from served_models import WORDS, Running, write_folder
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

import quantize
from quantize.models import ConvNet, ConvNetConfig
from quantize.run.decoding.structs import KERNELS
from quantize.run.serve import Settings, open_served, serve_model


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Models: `net` and `net8` (images), `lm` and `lm8` (bytes), `chat` (words), `bert` (vectors),
    `cross` (scores).
    """
    KERNELS.best()
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
        serve_model(
            quantize.quantize_dynamic(mlp, prefer="size"), "mlp8", None, torch.randn(1, 64)
        ),
        serve_model(lm, "lm"),
        serve_model(quantize.quantize_dynamic(lm, prefer="size", embeddings=True), "lm8"),
        open_served(write_folder(folder / "chat", words), "chat"),
        open_served(write_folder(folder / "bert", bert), "bert"),
        open_served(write_folder(folder / "cross", cross), "cross"),
    ]
    with Running(served, Settings(max_body=1 << 20)) as server:
        yield server


@pytest.fixture
def client(running: Running) -> Iterator[Any]:
    """OpenAI's. Importing it takes a second, which one worker spends: the one with the server."""
    import openai

    base = f"http://{running.address}/v1"
    with openai.OpenAI(base_url=base, api_key="none", max_retries=0) as made:
        yield made
