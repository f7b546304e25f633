"""What quantizing a layer shifts: the mean of each output, which its bias brings back.

Weights rounded to the nearest value miss a little of every input, and inputs whose mean is not 0,
such as those behind a ReLU, add these misses up. Errors that a bias takes back cost nothing when
the model runs (Nagel et al., arXiv 1906.04721, section 4.2). A shift counts as far as samples of
calibration agree on it: a mean of few that disagree would be another error on other inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from quantize import calibration as calibrating
from quantize.compression.int8.layers import Choice, Plans, converted


class _Misses:
    """Of a layer: what its int8 form misses of the mean of each output, by sample."""

    def __init__(self, small: nn.Module, channels: int) -> None:
        """channels: the dimension of the outputs, from the last."""
        self.small, self.channels = small, channels
        self.total: Any = 0.0  # float64 [out], of the samples
        self.squares: Any = 0.0
        self.count = 0

    def see(self, _: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> None:
        """A hook of the float layer's calls."""
        missed = (output - self.small(*args, **kwargs)).movedim(self.channels, -1)
        if not missed.numel():
            return
        width = missed.shape[-1]
        samples = missed.reshape(len(missed) if missed.dim() > 1 else 1, -1, width)
        means = samples.float().mean(1).double()
        self.total += means.sum(0)
        self.squares += means.square().sum(0)
        self.count += len(means)

    def shift(self) -> Tensor:
        """float64 [out]: the mean, less where it may be one by chance."""
        mean = self.total / self.count
        variance = (self.squares / self.count - mean.square()).clamp_min(0)
        chance = variance / max(self.count - 1, 1)
        known = (1 - chance / mean.square().clamp_min(1e-60)).clamp_min(0)
        return mean * known


def find_shifts(
    model: nn.Module, choice: Choice, plans: Plans, calibration: Iterable[Any]
) -> dict[str, Tensor]:
    """By layer that has a bias, what is to be added to it, `[out]` in float64."""
    seen: dict[str, _Misses] = {}
    hooks = []
    for name, fact in choice.chosen.items():
        module: Any = fact.module
        if getattr(module, "bias", None) is None or not (fact.linear or fact.convolution):
            continue
        channels = -1 if fact.linear else -1 - len(module.kernel_size)
        seen[name] = _Misses(converted(fact, plans.get(name)), channels)
        hooks.append(module.register_forward_hook(seen[name].see, with_kwargs=True))
    calibrating.run_all(model, calibration if seen else (), hooks)
    return {name: misses.shift() for name, misses in seen.items() if misses.count > 1}
