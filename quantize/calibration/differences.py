"""How far the outputs of two models are from each other."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from quantize.calibration.inputs import call, of_original, output_tensors, watching
from quantize.calibration.patches import snapshot
from quantize.seeding import seed_devices

BLOCK = 1 << 20  # elements of outputs that are compared at once
HALF = 0.5  # of the outputs: what is further away than this is hardly the same model


class FarAway(UserWarning):
    """The outputs of what was made are far from the original's."""


@torch.no_grad()
def distance(model: nn.Module, original: nn.Module, batches: Iterable[Any]) -> float:
    """How far the outputs of `model` are from the original's: norm of the difference over norm, all
    floating tensors.

    Both run in eval mode from their present state, which is as before afterwards, with the same
    random numbers.

    Args:
        batches: as `call` takes them.

    Raises:
        ValueError: the outputs have other shapes, or are not finite where the original's are.
    """
    results = []
    for part, given in ((model, batches), (original, of_original(batches))):
        results.append([])
        with watching((), part):
            for batch in given:
                seed_devices(0)
                results[-1].extend(_floating(call(part, batch)))
    return relative_error(*results)


def warn_if_far(
    technique: str, model: nn.Module, away: float, advice: str, *, bound: float = HALF
) -> None:
    """Warn who called the technique two calls further up with `FarAway`, where the outputs of what
    it made of `model` are further from the original's than `bound`.
    """
    if away > bound:
        kind = type(model).__name__
        line = f"{technique}: the outputs of {kind} moved by {away:.0%} on the first inputs"
        warnings.warn(f"{line}; {advice}", FarAway, stacklevel=4)


def _floating(output: Any) -> list[torch.Tensor]:
    """Its floating tensors, as they are now: a buffer may be among them."""
    return [snapshot(t) for t in output_tensors(output) if t.is_floating_point()]


def in_blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Parts of tensors of one shape, side by side and flat, so that float64 copies stay small."""
    flat = [tensor.reshape(-1).split(BLOCK) for tensor in tensors]
    yield from zip(*flat, strict=True)


def relative_error(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Root of the squared error over the squared size, all tensors together, where `expected` is
    finite.

    Raises ValueError for other shapes and for values that are not finite where the expected ones
    are.
    """
    shapes = [tuple(t.shape) for t in actual], [tuple(t.shape) for t in expected]
    if shapes[0] != shapes[1]:
        raise ValueError(f"its outputs have shapes {shapes[0]}, the original's {shapes[1]}")
    error = size = 0.0
    pairs = zip(actual, expected, strict=True)
    for a, e in itertools.chain.from_iterable(itertools.starmap(in_blocks, pairs)):
        finite = torch.isfinite(e)
        a, e = a[finite].double(), e[finite].double()
        if not torch.isfinite(a).all():
            raise ValueError("its outputs are not finite where the original's are")
        error += (a - e).square().sum().item()
        size += e.square().sum().item()
    return math.sqrt(error / max(size, 1e-30))


def largest_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of two tensors, relative to the largest expected value; infinity for
    other shapes or dtypes. Where both are the same infinity or both are NaN they don't differ.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return math.inf
    if torch.equal(actual, expected):
        return 0.0
    pair = [actual.detach(), expected.detach()]
    if actual.is_complex():
        pair = [torch.view_as_real(part.resolve_conj()) for part in pair]
    error = largest = 0.0
    for a, e in in_blocks(*pair):
        finite = torch.isfinite(e)
        if not torch.equal(torch.isfinite(a), finite):
            return math.inf
        if not torch.equal(a[~finite].nan_to_num(), e[~finite].nan_to_num()):
            return math.inf
        if finite.any():
            a, e = a[finite].double(), e[finite].double()
            error = max(error, (a - e).abs().max().item())
            largest = max(largest, e.abs().max().item())
    return error / max(largest, 1e-6)
