"""Make the layers that read pruned channels give what they gave before, from calibration inputs, without training.

Layer by layer in the order of the graph: run the original and the pruned model on every batch, keep moments of the pruned
layer's inputs and their product with the original layer's outputs, solve the ridge regression, write the new weight and bias.
Later layers see what the earlier, already repaired ones give. Memory is bounded by the square of a layer's input width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from quantize.calibration import call, rows


class _Reached(Exception):
    """The layer under repair has seen its input; the rest of the forward pass isn't needed."""


def as_matrix(module: nn.Module) -> torch.Tensor | None:
    """Weight of a layer as [out, K], K in the order of `calibration.rows`; None for a layer that can't be refitted."""
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return weight.detach().flatten(1) if module.groups == 1 else None
    if weight.ndim == 2 and hasattr(module, "in_features"):
        return weight.detach()
    if weight.ndim == 2 and hasattr(module, "nf"):  # GPT-2's Conv1D
        return weight.detach().T
    return None


def matrix_rows(module: nn.Module, channels: torch.Tensor) -> torch.Tensor:
    """Columns of `as_matrix` that belong to input channels [...], as [..., columns per channel]."""
    size = 1
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        size = module.weight[0, 0].numel()
    return channels[..., None] * size + torch.arange(size)


def _write(module: nn.Module, matrix: torch.Tensor, bias: torch.Tensor | None) -> None:
    weight = module._parameters["weight"]
    new = matrix.T if hasattr(module, "nf") and not hasattr(module, "in_features") else matrix
    weight.data.copy_(new.reshape(weight.shape))
    if bias is not None:
        module._parameters["bias"].data.copy_(bias)


def _see(model: nn.Module, layer: nn.Module, batch: Any, calls: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and outputs of `layer` in one pass over a batch; the pass stops after the layer's last call."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hook(_: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        seen.append((args[0] if args else next(iter(kwargs.values())), output))
        if len(seen) == calls:
            raise _Reached

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        call(model, batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen


def solve(moment: torch.Tensor, cross: torch.Tensor, start: torch.Tensor, ridge: float) -> torch.Tensor:
    """argmin over W of E|y - W x|^2 + ridge * mean(diag) * |W - start|^2; moment E[x x^T] [K, K], cross E[y x^T] [out, K].

    The pull goes to `start` and not to zero, so directions that calibration never shows keep the weights they had.
    """
    scale = moment.diagonal().mean().clamp(min=1e-12)
    shifted = moment + (ridge * scale) * torch.eye(len(moment), dtype=moment.dtype)
    gap = (cross - start @ moment).T
    factor, failed = torch.linalg.cholesky_ex(shifted)
    change = torch.cholesky_solve(gap, factor) if not failed else torch.linalg.lstsq(shifted, gap, driver="gelsd").solution
    return start + change.T


def refit(
    original: nn.Module,
    pruned: nn.Module,
    name: str,
    outputs: torch.Tensor | None,
    batches: Iterable[Any],
    *,
    ridge: float,
    calls: int = 1,
) -> None:
    """Refit layer `name` of `pruned` to the outputs (those kept, by index) of the same layer of `original`."""
    old, new = original.get_submodule(name), pruned.get_submodule(name)
    start = as_matrix(new).double()  # type: ignore[union-attr]
    count, mean_x, mean_y, moment, cross = 0, 0.0, 0.0, 0.0, 0.0
    for batch in batches:
        before, after = _see(original, old, batch, calls), _see(pruned, new, batch, calls)
        for (_, target), (given, _) in zip(before, after, strict=True):
            x = rows(new, given).float()  # [N, K]
            channel = 1 if isinstance(new, (nn.Conv1d, nn.Conv2d)) else target.ndim - 1
            y = target.movedim(channel, -1).reshape(-1, target.shape[channel]).float()  # [N, out]
            y = y if outputs is None else y[:, outputs]
            count += len(x)
            mean_x, mean_y = mean_x + x.sum(0).double(), mean_y + y.sum(0).double()
            moment, cross = moment + (x.T @ x).double(), cross + (y.T @ x).double()
    if count == 0:
        return
    mean_x, mean_y, moment, cross = mean_x / count, mean_y / count, moment / count, cross / count
    if not (torch.isfinite(moment).all() and torch.isfinite(cross).all()):
        raise ValueError(f"calibration gives layer {name!r} inputs or outputs that are not finite")
    if new._parameters.get("bias") is None:
        _write(new, solve(moment, cross, start, ridge), None)
        return
    weight = solve(moment - torch.outer(mean_x, mean_x), cross - torch.outer(mean_y, mean_x), start, ridge)
    _write(new, weight, mean_y - weight @ mean_x)


def reestimate(pruned: nn.Module, name: str, batches: Iterable[Any], calls: int = 1) -> None:
    """Running mean and variance of a BatchNorm, from what the pruned model now gives it."""
    norm = pruned.get_submodule(name)
    count, total, square = 0, 0.0, 0.0
    for batch in batches:
        for x, _ in _see(pruned, norm, batch, calls):
            x = x.movedim(1, -1).reshape(-1, x.shape[1]).double()
            count, total, square = count + len(x), total + x.sum(0), square + (x * x).sum(0)
    if count > 1:
        mean = total / count
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((square / count - mean**2).clamp(min=0) * count / (count - 1))


@torch.no_grad()
def repair(
    original: nn.Module,
    pruned: nn.Module,
    steps: Sequence[tuple[str, torch.Tensor | None]],
    batches: Iterable[Any],
    *,
    ridge: float = 1e-3,
    calls: dict[str, int],
) -> None:
    """Refit or re-estimate, in place, the layers named in `steps` (in the order of the graph; with the outputs they keep)."""
    for name, outputs in steps:
        if isinstance(pruned.get_submodule(name), nn.modules.batchnorm._BatchNorm):
            reestimate(pruned, name, batches, calls.get(name, 1))
        else:
            refit(original, pruned, name, outputs, batches, ridge=ridge, calls=calls.get(name, 1))
