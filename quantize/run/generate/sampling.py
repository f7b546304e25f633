"""From logits to the next token.

A token is drawn by the Gumbel-max rule: the largest of log-probability + noise, where the noise
belongs to the seed and the position alone. So a row gives the same tokens whatever stands beside it
in the batch, with or without a cache, and with any
draft: a draft that uses the same noise guesses right as often as its distribution agrees (Daliri et
al., arXiv 2408.07978), and what is kept is always the model's own draw.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantize import check

_WITHIN = {
    "temperature": "[0, inf)",
    "top_p": "(0, 1]",
    "min_p": "[0, 1)",
    "repetition_penalty": "(0, inf)",
}


@dataclass(frozen=True)
class Sampling:
    """How to choose a token. Temperature 0 takes the most probable one; the rest then has nothing
    to do but the penalty.

    top_k keeps the k most probable tokens, top_p the fewest that hold that much probability, min_p
    those at least that share of the most probable one's; ties stay. repetition_penalty divides
    positive and multiplies negative logits of tokens that the row already holds, prompt included
    (Keskar et al., arXiv 1909.05858). They apply in the order penalty, temperature, top_k, top_p,
    min_p. seed: one number (row i uses seed + i) or one per row.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | Sequence[int] | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Sampling:
        """From arguments of `generate`. Raises TypeError naming those that it doesn't have."""
        unknown = options.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise TypeError(f"generate has no argument named {', '.join(sorted(unknown))}")
        return cls(**options)

    def __post_init__(self) -> None:
        for name, within in _WITHIN.items():
            if getattr(self, name) is not None or name not in ("top_p", "min_p"):
                check.number(name, getattr(self, name), within)
        if self.top_k is not None:
            check.count("top_k", self.top_k)
        idle = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.temperature == 0 and idle:
            raise ValueError(
                f"{' and '.join(idle)} can't do anything at temperature 0 (greedy): give a "
                f"temperature > 0"
            )

    def seeds(self, batch: int) -> list[int]:
        """One seed per row; fresh ones if none was given. Raises ValueError for a wrong number of
        them.
        """
        if self.seed is None:
            return torch.randint(2**62, (batch,), device="cpu").tolist()
        seeds = (
            [self.seed + i for i in range(batch)] if isinstance(self.seed, int) else list(self.seed)
        )
        if len(seeds) != batch or not all(isinstance(s, int) for s in seeds):
            raise ValueError(
                f"seed is {self.seed!r}; allowed: an integer, or one for each of {batch} rows"
            )
        return seeds


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [B, V] with those of `seen` tokens (bool [B, V]) made less likely."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities [B, V] to draw from at a temperature > 0; -inf for what the limits
    exclude.
    """
    x = torch.log_softmax(logits.float() / sampling.temperature, dim=-1)
    if sampling.top_k is not None and sampling.top_k < x.shape[-1]:
        x = x.masked_fill(x < x.topk(sampling.top_k).values[..., -1:], -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        x = torch.log_softmax(x, dim=-1)
        x = x.masked_fill(x < _least_of_nucleus(x, sampling.top_p), -math.inf)
    if sampling.min_p:
        x = x.masked_fill(x < x.amax(-1, keepdim=True) + math.log(sampling.min_p), -math.inf)
    return torch.log_softmax(x, dim=-1)


def _least_of_nucleus(log_probs: Tensor, top_p: float) -> Tensor:
    """The smallest log-probability [B, 1] among the fewest tokens that hold `top_p`; sorts no more
    than it must.
    """
    count = min(128, log_probs.shape[-1])
    while True:
        best = log_probs.topk(count).values
        held = best.exp().cumsum(-1)
        if count == log_probs.shape[-1] or bool((held[..., -1] >= top_p).all()):
            needed = (held < top_p).sum(-1, keepdim=True).clamp(max=count - 1)
            return best.gather(-1, needed)
        count = min(count * 8, log_probs.shape[-1])


def draw(log_probs: Tensor, seeds: Sequence[int], position: int) -> Tensor:
    """One token per row [B] from log-probabilities [B, V]; the same for the same seed and
    position.
    """
    generator = torch.Generator("cpu")  # the same noise on every device
    noise = torch.empty(log_probs.shape, dtype=torch.float64, device="cpu")
    for row, seed in zip(noise, seeds, strict=True):
        generator.manual_seed((seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03) % 2**63)
        row.exponential_(generator=generator)
    return (log_probs.double() - noise.log_().to(log_probs.device)).argmax(-1)


class Chooser:
    """Chooses a token per row; knows the settings, the seeds and which tokens each row has seen."""

    def __init__(self, sampling: Sampling, batch: int):
        self.sampling, self.seeds = sampling, sampling.seeds(batch)
        self.penalty = sampling.repetition_penalty

    def __call__(self, logits: Tensor, position: int, seen: Tensor | None = None) -> Tensor:
        """Tokens [B] from logits [B, V] for `position`; seen: bool [B, V], needed if there is a
        penalty.

        Raises ValueError if a row has NaN or nothing but infinities to choose from.
        """
        if seen is not None:
            logits = penalize(logits, seen, self.penalty)
        best, token = logits.max(-1)
        rows = [row for row, value in enumerate(best.tolist()) if not math.isfinite(value)]
        if rows:
            raise ValueError(
                f"the model's logits for position {position} aren't finite in row {rows}"
            )
        if self.sampling.temperature == 0:
            return token
        return draw(distribution(logits, self.sampling), self.seeds, position)
