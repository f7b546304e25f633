"""How to train."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TrainConfig:
    """How to train: all that `fit` needs to know beside the model, the batches and the loss.

    Matrices between the input and the output layer are updated by Muon at `muon_lr`, all else by
    AdamW at `lr`. Rates rise over `warmup` steps, hold, and fall to zero over the last `cooldown`
    share of the steps.
    """

    steps: int
    batch: int = 32
    length: int = 256  # tokens in a window (text)
    short: float = (
        0.0  # share of the steps, at the start, that see twice as many windows of half the length
    )
    lr: float = 3e-3
    muon_lr: float = 0.02
    momentum: float = 0.9  # Muon's
    weight_decay: float = 0.0
    warmup: int = 20
    cooldown: float = 0.6
    clip: float = 1.0  # longest gradient norm; larger ones are scaled down to it

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "length"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise ValueError(
                    f"TrainConfig.{name} is {getattr(self, name)!r}; allowed: an integer >= 1"
                )
        for name in ("lr", "muon_lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"TrainConfig.{name} is {getattr(self, name)!r}; allowed: a finite number > 0"
                )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"TrainConfig.weight_decay is {self.weight_decay!r}; allowed: a finite number >= 0"
            )
        if not (isinstance(self.warmup, int) and self.warmup >= 0):
            raise ValueError(f"TrainConfig.warmup is {self.warmup!r}; allowed: an integer >= 0")
        for name in ("cooldown", "short"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"TrainConfig.{name} is {getattr(self, name)!r}; allowed: 0 to 1")
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"TrainConfig.momentum is {self.momentum!r}; allowed: at least 0, less than 1"
            )

    def rate(self, step: int) -> float:
        """Share of the full learning rates that `step`, counted from 0, uses."""
        rise = (step + 1) / (self.warmup + 1)
        fall = (self.steps - step) / max(1.0, self.cooldown * self.steps)
        return min(1.0, rise, fall)
