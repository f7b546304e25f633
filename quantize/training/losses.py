"""Losses of supervised training, in nats."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def next_token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy, in nats, of next tokens [B, T] under `model(ids [B, T])` -> logits [B, T,
    V].
    """
    ids, targets = batch
    return F.cross_entropy(model(ids).flatten(0, 1).float(), targets.flatten())


def classification_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy, in nats, of classes [N] under `model(images)` -> logits [N, classes]."""
    images, labels = batch
    return F.cross_entropy(model(images).float(), labels)
