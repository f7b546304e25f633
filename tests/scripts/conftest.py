"""What the tests of scripts and commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import quantize
from quantize import models
from quantize.measuring.result import Latency, Measurement


@pytest.fixture
def decoder(tmp_path) -> Path:
    """A byte decoder of random weights, in a file of ours."""
    torch.manual_seed(0)
    config = models.DecoderConfig(width=32, layers=1, heads=2, max_length=64)
    model = models.DecoderLM(config).eval()
    for parameter in model.parameters():  # as it starts, every block is the identity
        nn.init.normal_(parameter, std=0.2)
    quantize.save(model, tmp_path / "model.pth")
    return tmp_path / "model.pth"


@pytest.fixture
def faster(monkeypatch) -> Callable[..., None]:
    """`quantize verify` finds what it measures four times as fast, or as often as this is told."""

    def tell(speed: float, *notes: str) -> None:
        def compare(sources: dict, *_args: object, **_options: object) -> list[Measurement]:
            measured = []
            for name, ratio in zip(sources, (1.0, speed), strict=True):
                facts = (name, None, 1, 1, Latency(1 / ratio, 1 / ratio, 1 / ratio), ratio)
                rest = ({}, None, 1.0, None, "", 1, "")
                measured.append(Measurement(*facts, *rest, notes=notes))
            return measured

        monkeypatch.setattr("quantize.commands.verify.compare", compare)

    tell(4.0)
    return tell
