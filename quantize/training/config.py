"""How to train."""

from __future__ import annotations

from dataclasses import dataclass

from quantize import check

_WITHIN = {
    "lr": "(0, inf)",
    "muon_lr": "(0, inf)",
    "clip": "(0, inf)",
    "weight_decay": "[0, inf)",
    "momentum": "[0, 1)",
    "cooldown": "[0, 1]",
    "short": "[0, 1]",
}


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
        for name, least in (("steps", 1), ("batch", 1), ("length", 1), ("warmup", 0)):
            check.count(f"TrainConfig.{name}", getattr(self, name), least)
        for name, within in _WITHIN.items():
            check.number(f"TrainConfig.{name}", getattr(self, name), within)

    def rate(self, step: int) -> float:
        """Share of the full learning rates that `step`, counted from 0, uses."""
        rise = (step + 1) / (self.warmup + 1)
        fall = (self.steps - step) / max(1.0, self.cooldown * self.steps)
        return min(1.0, rise, fall)
