"""What a model has lost: the user's metric, or how far its outputs are from the original's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.calibration import call, main_output, watching, without_cache
from quantize.measuring.artifact import as_metrics
from quantize.measuring.rows import higher_is_better, metric_noise

RESAMPLES = 200  # of the held-out batches, for the noise of their mean


@dataclass(frozen=True)
class Score:
    """Of one model.

    Args:
        metrics: by name; the first one counts.
        loss: how much worse the first one is than the original's; below 0 where it is better.
        noise: what the loss may be by chance, one standard error.
    """

    metrics: dict[str, float]
    loss: float
    noise: float


class Evaluated:
    """Judges by the user's function.

    Args:
        evaluate: called with a model; gives a number, a (name, number) pair or a dict of numbers.
        original: called twice, so that a metric that varies by itself is known.

    Raises:
        ValueError: it gives something that isn't finite for the original.
        TypeError: it gives no number.
    """

    def __init__(self, evaluate: Callable[[Any], Any], original: nn.Module) -> None:
        self.evaluate = evaluate
        first, again = (as_metrics(evaluate(original)) for _ in range(2))
        self.name, self.value = next(iter(first.items()))
        if not math.isfinite(self.value):
            raise ValueError(f"evaluate gives {self.name}={self.value} for the original model")
        self.higher = higher_is_better(self.name)
        sampled = metric_noise(self.value, self.value, first)
        self.noise = max(abs(again[self.name] - self.value), sampled)
        self.metrics = first

    def score(self, model: Any) -> Score:
        """Raises ValueError where the metric isn't finite, and what `evaluate` raises."""
        metrics = as_metrics(self.evaluate(model))
        if self.name not in metrics or not math.isfinite(metrics[self.name]):
            raise ValueError(f"evaluate gives {self.name}={metrics.get(self.name)}")
        change = metrics[self.name] - self.value
        loss = 0.0 - change if self.higher else change  # no -0.0
        return Score(metrics, loss, self.noise)


class Divergence:
    """Judges by the outputs on held-out batches: KL divergence of logits, else 1 - cosine.

    Args:
        original: its outputs are kept.
        batches: as `calibration.call` takes them.
    """

    higher = False

    def __init__(self, original: nn.Module, batches: Sequence[Any]) -> None:
        self.batches = batches
        self.expected = [_answer(original, batch) for batch in batches]
        self.logits = all(is_logits for _, is_logits in self.expected)
        self.name = "kl_divergence" if self.logits else "cosine_distance"
        self.value = 0.0
        self.noise = 0.0
        self.metrics = {self.name: 0.0}

    def score(self, model: Any) -> Score:
        """Raises ValueError for outputs of another shape or that are not finite."""
        divergences = []
        for batch, (expected, _) in zip(self.batches, self.expected, strict=True):
            actual, _ = _answer(model, batch)
            if actual.shape != expected.shape:
                raise ValueError(f"its output is {list(actual.shape)}, not {list(expected.shape)}")
            if self.logits:
                divergences.append(_kl(actual, expected))
            else:
                divergences.append(1 - F.cosine_similarity(actual, expected, dim=-1).mean())
        each = torch.stack(divergences).double()
        if not torch.isfinite(each).all():
            raise ValueError("its outputs are not finite")
        loss = each.mean().item()
        return Score({self.name: loss}, loss, _bootstrap(each))


def _answer(model: Any, batch: Any) -> tuple[Tensor, bool]:
    """The main output as rows [N, C] in fp32, and whether it is logits."""
    with torch.no_grad():
        if isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule):
            with watching((), model), without_cache(model):
                output = call(model, batch)
        else:
            output = call(model, batch)
    main = main_output(output)
    named = output is not main and getattr(output, "logits", None) is main
    bare = output is main and main.ndim in (2, 3) and main.shape[-1] > 1
    rows = main.reshape(-1, main.shape[-1]) if main.ndim > 1 else main[None]
    return rows.float().clone(), named or bare


def _kl(actual: Tensor, expected: Tensor) -> Tensor:
    target = expected.log_softmax(-1)
    return F.kl_div(actual.log_softmax(-1), target, log_target=True, reduction="batchmean")


def _bootstrap(values: Tensor) -> float:
    """Standard error of the mean, from means of resamples; 0 for a single value."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    return values[drawn].mean(1).std().item()
