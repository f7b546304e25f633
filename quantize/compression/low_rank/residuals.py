"""What a layer that is to be fitted gets from the compressed model, beside what it got and gave in
the original one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from quantize import calibration as calibrate
from quantize.calibration import Call, Walk


@dataclass
class Seen(calibrate.PairedStatistics):
    """Sums over rows of a layer's inputs x [K] and r [K] in the two models, and of the error e [M]
    of what its output joins.
    """

    error_total: torch.Tensor | float = 0.0  # [M]
    error: torch.Tensor | float = 0.0  # [M, K], sum of e (x - shift)^T

    def update_error(self, x: torch.Tensor, error: torch.Tensor) -> None:
        """Add rows x [N, K], e [N, M]."""
        x = self.shifted(calibrate.exact(x))
        dtype = torch.promote_types(x.dtype, error.dtype)
        self.error_total = self.error_total + error.sum(0, dtype=torch.float64)
        self.error = self.error + (error.T.to(dtype) @ x.to(dtype)).double()

    @property
    def error_mean(self) -> torch.Tensor | None:
        """E[e], [M]; None where the layer's output joins nothing."""
        return self.error_total / self.count if torch.is_tensor(self.error_total) else None

    @property
    def error_covariance(self) -> torch.Tensor | None:
        """E[e x^T] - E[e] E[x]^T, [M, K]; None where the layer's output joins nothing."""
        if self.error_mean is None:
            return None
        return self.error / self.count - torch.outer(self.error_mean, self.from_shift)

    @property
    def error_moment(self) -> torch.Tensor | None:
        """E[e x^T], [M, K]; None where the layer's output joins nothing."""
        covariance, mean = self.error_covariance, self.error_mean
        if covariance is None or mean is None:
            return None
        return covariance + torch.outer(mean, self.mean)


def collect(
    walk: Walk,
    model: nn.Module,
    reference: nn.Module,
    names: Collection[str],
    streams: set[str],
) -> dict[str, Seen]:
    """What the layers `names` see in `model`, paired with the same layers in `reference`, row by
    row.

    Args:
        walk: of the reference, at these layers.
        streams: see `calibration.find_streams`.

    Returns:
        By name, without layers that no batch reaches in `model`, or whose inputs there aren't
        finite.
    """
    seen = {name: Seen() for name in names}
    for theirs, ours in walk.show((reference, model), names, streams.intersection(names)):
        for name in names:
            calls = [call for call in ours if call.name == name]
            others = [call for call in theirs if call.name == name]
            if len(calls) != len(others):
                others = calls  # the two models take other ways on this batch
            for call, other in zip(calls, others, strict=True):
                _add(seen[name], model.get_submodule(name), call, other)
    return {name: s for name, s in seen.items() if s.count and torch.isfinite(s.largest).all()}


def _add(seen: Seen, layer: nn.Module, call: Call, other: Call) -> None:
    """Add what one call of `layer` shows, beside the original's `other`."""
    x = calibrate.rows(layer, call.input)
    seen.update_pair(x, calibrate.rows(layer, other.input))
    if call.stream is None or other.stream is None or call.stream.shape != other.stream.shape:
        return
    error = calibrate.exact(other.stream) - calibrate.exact(call.stream)
    error = error.movedim(-3, -1) if isinstance(layer, nn.Conv2d) else error
    seen.update_error(x, error.reshape(-1, error.shape[-1]))
