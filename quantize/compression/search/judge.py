"""What a model has lost, by the user's metric."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantize import clock, surgery
from quantize.measuring.artifact import as_metrics, per_example, standard_error
from quantize.measuring.rows import higher_is_better, metric_noise
from quantize.saying import Say, silent

SLOW = 0.1  # share of the minutes: an evaluation that takes more isn't repeated for its noise


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

    Its noise is known from the values of single examples, from "standard_error" or "examples" among
    the metrics, and from a second call with the same model. Where there are values of single
    examples, a loss has the noise of their differences, example by example.

    Whether more is better the metric's name says, or that of `evaluate` (`def accuracy(model)`), or
    else what it gives for a copy of the model with shuffled weights, which is worse.

    Args:
        evaluate: called with a model; gives a number, or one for each example, a (name, number)
            pair or a dict of them.
        original: called twice, so that a metric that varies by itself is known.
        seconds: that the search may take; a second call of a slow function is left out.
        say: called with a line for people.

    Raises:
        ValueError: it fails for the original, or gives something that isn't finite.
        TypeError: it gives no number.
    """

    def __init__(
        self,
        evaluate: Callable[[Any], Any],
        original: nn.Module,
        seconds: float = math.inf,
        say: Say = silent,
    ) -> None:
        self.evaluate = evaluate
        result, taken = clock.timed(partial(self._first, original))
        self.metrics = as_metrics(result)
        self.each = per_example(result)
        self.name, self.value = next(iter(self.metrics.items()))
        if not math.isfinite(self.value):
            raise ValueError(f"evaluate gives {self.name}={self.value} for the original model")
        self.scale = abs(self.value)  # what a loss in percent is a share of
        self.noise = metric_noise(self.value, self.value, self.metrics)
        self.varies = 0.0  # from one call to the next
        if taken > SLOW * seconds:
            say(f"evaluate takes {taken:.3g} s a call: whether it varies isn't tried")
        else:
            self._repeat(original, say)
        self.higher = self._direction(original, say)

    def score(self, model: Any) -> Score:
        """Raises ValueError where the metric isn't finite, and what `evaluate` raises."""
        result = self.evaluate(model)
        metrics = as_metrics(result)
        if not math.isfinite(metrics.get(self.name, math.nan)):
            raise ValueError(f"evaluate gives {metrics}, and no finite {self.name}")
        change = metrics[self.name] - self.value
        loss = 0.0 - change if self.higher else change  # no -0.0
        return Score(metrics, loss, self._noise(per_example(result)))

    def _direction(self, original: nn.Module, say: Say) -> bool:
        """Whether a higher metric is better. A UserWarning where nothing says so."""
        for name in (self.name, getattr(self.evaluate, "__name__", "")):
            named = higher_is_better(name)
            if named is not None:
                return named
        say(f"evaluate a copy with shuffled weights, to see which way {self.name} gets worse")
        try:
            shuffled = as_metrics(self.evaluate(_shuffled(original)))[self.name]
        except Exception:  # of somebody's code, with a model that it isn't made for
            shuffled = math.nan
        if math.isnan(shuffled) or shuffled == self.value:
            warnings.warn(
                f"nothing says whether a higher {self.name!r} is better: lower is taken for "
                f"better. Let evaluate return {{'accuracy': value}} or {{'loss': value}}",
                stacklevel=5,  # of who called `compress`
            )
            return False
        return shuffled < self.value

    def _first(self, original: nn.Module) -> Any:
        try:
            return self.evaluate(original)
        except Exception as error:  # of somebody's code
            said = f"{type(error).__name__}: {error}"
            raise ValueError(f"evaluate fails for the original model: {said}") from error

    def _repeat(self, original: nn.Module, say: Say) -> None:
        again = as_metrics(self._first(original))
        varies = abs(again.get(self.name, math.nan) - self.value)
        if not math.isfinite(varies):
            raise ValueError(
                f"evaluate gives {self.name}={self.value:.6g} for the original model, and "
                f"{again} when it is called again: each call must read its data from the start"
            )
        if varies > 0:
            say(
                f"evaluate gives {self.name}={self.value:.6g}, then {again[self.name]:.6g} for the "
                f"same model: changes of that size are taken as noise"
            )
        self.noise = max(self.noise, varies)
        self.varies = varies

    def _noise(self, each: Tensor | None) -> float:
        """Of a loss: of the differences where examples can be paired, else the metric's own."""
        if self.each is None or each is None or each.shape != self.each.shape:
            return self.noise
        return max(standard_error(each - self.each), self.varies)


def _shuffled(model: nn.Module) -> nn.Module:
    """A copy in which the numbers of each matrix or kernel have changed places."""
    copy = surgery.clone(model)
    generator = torch.Generator().manual_seed(0)
    for weight in copy.parameters():
        if weight.ndim > 1:
            order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
            weight.data = weight.detach().flatten()[order].view_as(weight)
    return copy
