"""Training batches as pure functions of the step, so that training resumes at any of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quantize import check
from quantize.training.data.images import ImageData
from quantize.training.data.reading import DataError


class TextBatches:
    """Training windows as a pure function of the step: `batches(step) -> (ids, next ids)`, int64
    [B, T] each.

    Nothing is remembered between steps, so training resumes at any of them. Each pass visits all
    windows of the text in an order drawn from the seed, cut from a shifted start. `batch` is what
    one rank sees; the ranks of one step share out the windows that a single rank with `batch *
    world` would see.

    The first `short_steps` steps see twice as many windows of half the length: more different text
    for the same work, while the model still learns what is near.
    """

    def __init__(
        self,
        text: Tensor,
        *,
        batch: int,
        length: int,
        short_steps: int = 0,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        check.count("batch", batch)
        check.count("length", length)
        if len(text) <= 2 * length:
            raise DataError(
                f"data: {len(text)} bytes to train on are too few for windows of {length} bytes"
            )
        self.text, self.length, self.short_steps = text, length, short_steps
        # of the windows that fit, one is left out: room to shift
        self._rows = _Rows((len(text) - 1) // length - 1, batch, seed, rank, world)
        if short_steps > 0:
            self._short = TextBatches(
                text,
                batch=2 * batch,
                length=max(1, length // 2),
                seed=seed + 1,
                rank=rank,
                world=world,
            )

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        if step < self.short_steps:
            return self._short(step)
        starts = [place * self.length + shift % self.length for place, shift in self._rows(step)]
        rows = torch.stack([self.text[start : start + self.length + 1] for start in starts]).long()
        return rows[:, :-1], rows[:, 1:]


class ImageBatches:
    """Training images as a pure function of the step: `batches(step) -> (images, labels)`; see
    `TextBatches`.
    """

    def __init__(
        self, data: ImageData, *, batch: int, seed: int = 0, rank: int = 0, world: int = 1
    ):
        check.count("batch", batch)
        self.images, self.labels = data.train_images, data.train_labels
        self._rows = _Rows(len(self.labels), batch, seed, rank, world)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        rows = torch.tensor([place for place, _ in self._rows(step)])
        return self.images[rows], self.labels[rows]


class _Rows:
    """Which of `count` samples make up a step, with a number drawn per pass, for shifting."""

    def __init__(self, count: int, batch: int, seed: int, rank: int, world: int):
        self.count, self.batch, self.seed, self.rank, self.world = count, batch, seed, rank, world
        self._order: tuple[int, np.ndarray, int] = (-1, np.empty(0, dtype=np.int64), 0)

    def __call__(self, step: int) -> list[tuple[int, int]]:
        first = (step * self.world + self.rank) * self.batch
        return [self._sample(first + row) for row in range(self.batch)]

    def _sample(self, index: int) -> tuple[int, int]:
        epoch, place = divmod(index, self.count)
        if self._order[0] != epoch:  # a memo of a pure function, not state
            random = np.random.default_rng((self.seed, epoch))
            self._order = (epoch, random.permutation(self.count), int(random.integers(2**31)))
        return int(self._order[1][place]), self._order[2]
