"""A network, batches and a recipe that the tests of training share."""

import hashlib
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from quantize import training
from quantize.training import Progress, TrainConfig, classification_loss, fit

RECIPE = TrainConfig(steps=12, batch=8, warmup=2, lr=1e-2)


def network():
    """A model with dropout and BatchNorm: random numbers and buffers must survive a resume too."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


def batches(step):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    return x, x[:, :3].argmax(1)


def digest(model):
    content = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    return hashlib.sha256(content).hexdigest()


def two_rank_task(rank, world):
    """Model, batches, loss, recipe: one step's 8 rows, shared out over the ranks (no BatchNorm: its
    statistics differ).
    """
    torch.manual_seed(rank)  # ranks that start apart must be brought together
    model = nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    )
    rows = slice(8 // world * rank, 8 // world * (rank + 1))
    return (
        model,
        lambda step: tuple(part[rows] for part in batches(step)),
        classification_loss,
        RECIPE,
    )


def train_on(folder: Path, steps: int, last: int | None = None) -> None:
    """Go on with the training in a folder, say each step, and write what came out.

    last: the step that it stays at until it is killed.
    """

    def say(at: Progress) -> None:
        (folder / "step").write_text(str(at.step))
        while at.step == last:
            time.sleep(1)

    model = fit(
        network(),
        batches,
        classification_loss,
        replace(RECIPE, steps=steps),
        checkpoint_path=folder / "state",
        checkpoint_seconds=0,
        resume=True,
        on_progress=say,
    )
    (folder / "digest").write_text(digest(model))


def train_as_rank(path: Path) -> None:
    """One of two ranks; the first one writes the weights."""
    with training.distributed() as (rank, world):
        assert world == 2
        model = fit(*two_rank_task(rank, world), bf16=False)
    if rank == 0:
        torch.save(model.state_dict(), path)
