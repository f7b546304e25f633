"""The models of `search.py` and their data: small, and trained for some seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from models import sizes
from torch import Tensor, nn

import quantize
from quantize.calibration import main_output
from quantize.measuring.artifact import as_metrics
from quantize.training import data

SEED, BATCH, LENGTH = 0, 8, 64
SIZES = sizes(192, 4)


@dataclass(frozen=True)
class Task:
    """A model and its data.

    Args:
        build: the model with new weights.
        batch: gives the inputs and targets of a training step.
        loss: of outputs and targets.
        inputs: held-out batches, for calibration; the first one is timed.
        evaluate: the metric.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    loss: Callable[[Any, Tensor], Tensor]
    inputs: list[Tensor]
    evaluate: Callable[[Any], dict[str, Any]]


def encoder(kind: str, **config: Any) -> Any:
    """A BERT of bytes, four blocks of width 192."""
    text = {"vocab_size": 256, "max_position_embeddings": LENGTH}
    return getattr(transformers, kind)(transformers.BertConfig(**SIZES, **text, **config))


def windows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Windows of source and of prose, [N, LENGTH] ids with what they are: train, then held out."""
    text = data.load_text()
    found = []
    for part in (text.train, text.validation):
        count = min(len(part) // LENGTH, 20_000)
        ids = part[: count * LENGTH].view(count, LENGTH).long()
        code = ((ids == ord("(")) | (ids == ord("_"))).sum(1)
        labels = (code > code.median()).long()
        found += [ids, labels]
    return found[0], found[1], found[2][:512], found[3][:512]


def accuracy(model: Any, inputs: Tensor, labels: Tensor) -> dict[str, float]:
    with torch.no_grad():
        guesses = torch.cat([main_output(model(part)).argmax(-1) for part in inputs.split(64)])
    return {"accuracy": (guesses == labels).double().mean().item(), "examples": len(labels)}


def classified(build: Callable[[], nn.Module], parts: tuple[Tensor, ...]) -> Task:
    """A task with labels, of train inputs and labels and held-out ones."""
    train, labels, held, held_labels = parts

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        rows_ = torch.randint(len(train), (16,), generator=generator)
        return train[rows_], labels[rows_]

    def loss(output: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(main_output(output), targets)

    inputs = list(train[: 8 * BATCH].split(BATCH))
    evaluate = lambda model: accuracy(model, held, held_labels)  # noqa: E731
    return Task(build, batch, loss, inputs, evaluate)


def text_task() -> Task:
    return classified(lambda: encoder("BertForSequenceClassification", num_labels=2), windows())


def digits(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scikit-learn's digits, [N, 1, size, size]: train, then held out."""
    known = data.load_images()
    parts = (known.train_images, known.validation_images)
    train, held = (F.interpolate(images, size=size, mode="bilinear") for images in parts)
    return train, known.train_labels, held, known.validation_labels


def cnn_task() -> Task:
    config = quantize.ConvNetConfig(in_channels=1, widths=(32, 64, 128), blocks=1, classes=10)
    return classified(lambda: quantize.ConvNet(config), digits(32))


def vit_task() -> Task:
    shape = {"image_size": 32, "patch_size": 4, "num_channels": 1, "num_labels": 10}
    config = transformers.ViTConfig(**SIZES, **shape)
    return classified(lambda: transformers.ViTForImageClassification(config), digits(32))


def sentence_task() -> Task:
    """Two halves of a window should have the nearest embeddings among 24 windows."""
    train, _, held, _ = windows()
    halves = LENGTH // 2

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        rows_ = train[torch.randint(len(train), (24,), generator=generator)]
        return torch.cat(rows_.split(halves, 1)), torch.arange(24)

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(_similarities(output), targets)

    def evaluate(model: Any) -> dict[str, Tensor]:
        """The loss of each of 480 windows, so that the search knows its noise."""
        losses = []
        with torch.no_grad():
            for part in held[:480].split(24):
                scores = _similarities(model(torch.cat(part.split(halves, 1))))
                losses.append(F.cross_entropy(scores, torch.arange(24), reduction="none"))
        return {"contrastive_loss": torch.cat(losses)}

    inputs = list(train[: 8 * BATCH, :halves].split(BATCH))
    return Task(lambda: encoder("BertModel"), batch, loss, inputs, evaluate)


def _similarities(output: Any) -> Tensor:
    """Of each first half to each second one, [N, N], sharpened; an embedding is the mean of the
    last hidden states.
    """
    embeddings = main_output(output).mean(1)
    first, second = F.normalize(embeddings, dim=-1).chunk(2)
    return 20 * first @ second.T


def decoder_task() -> Task:
    text = data.load_text()
    config = quantize.DecoderConfig(width=192, layers=4, heads=3, qk_norm=True, max_length=512)
    batches = data.TextBatches(text.train, length=LENGTH, batch=8, seed=SEED)

    held = text.validation[: 256 * LENGTH].view(256, LENGTH).long()

    def evaluate(model: Any) -> dict[str, Tensor]:
        """Of each of 256 windows."""
        bits = []
        with torch.no_grad():
            for part in held.split(64):
                nats = F.cross_entropy(
                    model(part[:, :-1]).transpose(1, 2), part[:, 1:], reduction="none"
                )
                bits.append(nats.mean(1) / math.log(2))
        return {"bits_per_byte": torch.cat(bits)}

    def loss(output: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), targets.flatten())

    inputs = [batches(step)[0][:BATCH] for step in range(10_000, 10_008)]
    return Task(lambda: quantize.DecoderLM(config), batches, loss, inputs, evaluate)


TASKS = {
    "text": text_task,
    "sentence": sentence_task,
    "cnn": cnn_task,
    "vit": vit_task,
    "decoder": decoder_task,
}


def trained(name: str, task: Task, folder: Path, seconds: float) -> nn.Module:
    """The model after so many seconds of training, kept in the folder."""
    torch.manual_seed(SEED)
    model = task.build()
    path = folder / f"{name}.pth"
    if path.exists():
        return quantize.open_model(path, model)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    start, step = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        left = 1 - (time.monotonic() - start) / seconds
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 50, max(left, 0.02))
        inputs, targets = task.batch(step)
        optimizer.zero_grad()
        task.loss(model(inputs), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
    folder.mkdir(parents=True, exist_ok=True)
    quantize.save(model.eval(), path)
    print(f"{name}: {step} steps, {as_metrics(task.evaluate(model))}", flush=True)
    return model
