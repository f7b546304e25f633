"""The small trainings of the benchmarks that compare qualities: the standard library's text and
scikit-learn's digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from quantize import ConvNet, ConvNetConfig, DecoderConfig, DecoderLM
from quantize.training import classification_loss, evaluate_images, evaluate_text, next_token_loss
from quantize.training.data import ImageBatches, TextBatches, load_images, load_text

SCORED_BYTES = 2**15


class Score(NamedTuple):
    """On held-out data: bits per byte or accuracy, and the cross-entropy in nats."""

    metric: float
    nats: float


@dataclass
class Task:
    """A model, its training and its measure.

    Args:
        model: untrained.
        steps: of its training.
        batches: step -> (inputs, targets).
        loss: of a model on a batch.
        score: of a trained model.
        metric: the name of the score's.
        rate: of AdamW.
    """

    model: nn.Module
    steps: int
    batches: Callable[[int], tuple]
    loss: Callable[[nn.Module, tuple], torch.Tensor]
    score: Callable[[nn.Module], Score]
    metric: str
    rate: float = 2e-3


def text_task(model: nn.Module, steps: int) -> Task:
    text = load_text()

    def score(m: nn.Module) -> Score:
        windows = {"length": 128, "overlap": 64, "max_bytes": SCORED_BYTES}
        bits = evaluate_text(m, text.validation, **windows)["bits_per_byte"]
        return Score(bits, bits * math.log(2))

    batches = TextBatches(text.train, batch=8, length=128)
    return Task(model, steps, batches, next_token_loss, score, "bits per byte")


def image_task(model: nn.Module, steps: int) -> Task:
    data = load_images()

    def score(m: nn.Module) -> Score:
        found = evaluate_images(m, data.validation_images, data.validation_labels)
        return Score(found["accuracy"], found["loss"])

    return Task(model, steps, ImageBatches(data, batch=64), classification_loss, score, "accuracy")


def fit(model: nn.Module, batches: Callable, loss: Callable, steps: int, rate: float) -> nn.Module:
    """Train in place by AdamW: a short rise, then a fall over half of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    shape = lambda i: min(1.0, (i + 1) / 20, (steps - i) / (0.5 * steps))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, batches(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


class Logits(nn.Module):
    """A model of transformers as tensor in, logits out; images enlarged from 8x8 by `enlarge`."""

    def __init__(self, model: nn.Module, enlarge: int = 1):
        super().__init__()
        self.model, self.enlarge = model, enlarge

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(x, scale_factor=self.enlarge) if self.enlarge > 1 else x
        return self.model(x).logits


class Pixels(Logits):
    """A text classifier that reads an 8x8 image as 64 tokens, one of 17 for each pixel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model((16 * x).round().long().flatten(1)).logits


def classifier(kind: str, steps: int, enlarge: int = 1, **config: Any) -> Task:
    """An image classifier of transformers on digits."""
    configuration = getattr(transformers, f"{kind}Config")(num_labels=10, num_channels=1, **config)
    model = getattr(transformers, f"{kind}ForImageClassification")(configuration)
    return image_task(Logits(model, enlarge), steps)


TRANSFORMER = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}


def vit() -> Task:
    return classifier("ViT", 400, image_size=8, patch_size=2, **TRANSFORMER)


def resnet() -> Task:
    sizes = {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 1]}
    return classifier("ResNet", 200, 4, layer_type="basic", **sizes)


def mobilenet_v2() -> Task:
    return classifier("MobileNetV2", 200, 4, image_size=32, depth_multiplier=0.35)


def convnext() -> Task:
    sizes = {"hidden_sizes": [32, 64], "depths": [2, 2], "num_stages": 2}
    return classifier("ConvNext", 300, 2, image_size=16, patch_size=2, **sizes)


def bert() -> Task:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"vocab_size": 17, "num_labels": 10, "max_position_embeddings": 64}
    config = transformers.BertConfig(**sizes, **TRANSFORMER, **dropout)
    return image_task(Pixels(transformers.BertForSequenceClassification(config)), 300)


def convnet() -> Task:
    return image_task(ConvNet(ConvNetConfig(widths=(32, 64), blocks=2)), 300)


def decoder() -> Task:
    return text_task(DecoderLM(DecoderConfig(width=128, layers=4, heads=4)), 400)


PRUNED: dict[str, Callable[[], Task]] = {
    "convnet": convnet,
    "vit": vit,
    "resnet": resnet,
    "mobilenet_v2": mobilenet_v2,
    "convnext": convnext,
    "decoder": decoder,
    "bert": bert,
}
