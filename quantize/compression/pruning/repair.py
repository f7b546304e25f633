"""Make the layers that read pruned channels give what they gave before, from calibration inputs,
without training.

Layer by layer in the order of the graph: run the original and the pruned model on every batch, keep
moments of the pruned layer's inputs and their product with the original layer's outputs, solve a
ridge regression, write the new weight and bias. Later layers see what the earlier, already repaired
ones give. Memory is bounded by the square of a layer's input width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from quantize.calibration import call, exact, rows, watching, without_cache


@dataclass
class Step:
    """Layers to repair at once: they read the same tensor, one after another.

    layers: the outputs that each keeps, by index (None: all). calls: how often the layer runs in a
        pass, if it is only one.
    stream: its output is added to a residual stream.
    """

    layers: dict[str, torch.Tensor | None]
    calls: int = 1
    stream: bool = False


class _Reached(BaseException):
    """The layer under repair has seen its input; the rest of the forward pass isn't needed."""


def as_matrix(module: nn.Module) -> torch.Tensor | None:
    """Weight of a layer as [out, K], K in the order of `calibration.rows`; None for a layer that
    can't be refitted.
    """
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


@dataclass
class Seen:
    """One call of a layer: its input and output, the tensor that the model goes on with, and what
    was then added to that.
    """

    given: torch.Tensor
    output: torch.Tensor
    passed_on: torch.Tensor
    stream: torch.Tensor | None = None


class _Additions(TorchFunctionMode):
    """Ends the pass where the watched output is added to something, and keeps that."""

    def __init__(self, seen: list[Seen]):
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if self.seen and len(args) > 1 and getattr(function, "__name__", "") in ADDITIONS:
            output = self.seen[-1].passed_on
            for ours, other in ((args[0], args[1]), (args[1], args[0])):
                tensors = isinstance(ours, torch.Tensor) and isinstance(other, torch.Tensor)
                if (
                    tensors
                    and ours.shape == other.shape == output.shape
                    and ours.data_ptr() == output.data_ptr()
                ):
                    self.seen[-1].stream = other.clone()
                    raise _Reached
        return function(*args, **(kwargs or {}))


ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


def _see(
    model: nn.Module, names: Sequence[str], batch: Any, calls: int, *, stream: bool = False
) -> list[Seen]:
    """The calls of some layers in one pass over a batch; it ends after the last one (with `stream`,
    after the addition).
    """
    seen: list[Seen] = []

    def hook(_: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        seen.append(
            Seen(given.clone(), output.clone(), output)
        )  # clones: what follows may write into them
        if len(seen) == calls and not stream:
            raise _Reached

    handles = [
        model.get_submodule(name).register_forward_hook(hook, with_kwargs=True) for name in names
    ]
    with (
        watching(handles, model),
        without_cache(model),
        _Additions(seen) if stream else nullcontext(),
    ):
        try:
            call(model, batch)
        except _Reached:
            pass
    return seen


RIDGES = (
    1e-7,
    1e-5,
    1e-4,
    1e-3,
    1e-2,
    1e-1,
    1.0,
    1e3,
)  # times the mean input power; the last leaves the weight as it was


@dataclass
class Moments:
    """Sums over rows of inputs x [K] (a 1 appended where there is a bias) and targets y [out]."""

    count: int = 0
    outer: torch.Tensor | float = 0.0  # [K, K], sum of x x^T
    cross: torch.Tensor | float = 0.0  # [out, K], sum of y x^T

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        x, y = (
            x.to(torch.promote_types(x.dtype, y.dtype)),
            y.to(torch.promote_types(x.dtype, y.dtype)),
        )
        self.count += len(x)
        self.outer = self.outer + (x.T @ x).double()
        self.cross = self.cross + (y.T @ x).double()

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.outer + other.outer, self.cross + other.cross)

    def error(self, weight: torch.Tensor) -> float:
        """Sum over rows of |y - W x|^2, up to the part that doesn't depend on W."""
        return float(((weight @ self.outer) * weight).sum() - 2 * (weight * self.cross).sum())


def solve(moments: Moments, start: torch.Tensor, ridge: float, *, bias: bool) -> torch.Tensor:
    """argmin over W [out, K] of E|y - W x|^2 + ridge * mean(E x^2) * |W - start|^2; the bias, if
    any, is not pulled.

    The pull goes to `start` and not to zero, so directions that calibration never shows keep the
    weights they had.
    """
    moment, cross = moments.outer / moments.count, moments.cross / moments.count
    power = moment.diagonal()[:-1] if bias else moment.diagonal()
    pull = torch.full_like(moment.diagonal(), ridge * float(power.mean().clamp(min=1e-12)))
    if bias:
        pull[-1] = 1e-12
    gap = (cross - start @ moment).T
    factor, failed = torch.linalg.cholesky_ex(moment + torch.diag(pull))
    change = (
        torch.cholesky_solve(gap, factor)
        if not failed
        else torch.linalg.lstsq(moment + torch.diag(pull), gap).solution
    )
    return start + change.T


def fit_weight(halves: tuple[Moments, Moments], start: torch.Tensor, *, bias: bool) -> torch.Tensor:
    """Ridge regression on both halves of the rows, with the ridge that does best on one half when
    fitted on the other.
    """
    first, second = halves
    if min(first.count, second.count) == 0:
        return solve(first + second, start, 1e-2, bias=bias)
    errors = {
        ridge: second.error(solve(first, start, ridge, bias=bias))
        + first.error(solve(second, start, ridge, bias=bias))
        for ridge in RIDGES
    }
    return solve(first + second, start, min(errors, key=errors.__getitem__), bias=bias)


def refit(original: nn.Module, pruned: nn.Module, step: Step, batches: Iterable[Any]) -> None:
    """Refit layers of `pruned` to the outputs (those kept) of the same layers of `original`.

    In a stream, what is fitted is the sum: the layer also makes up for what the stream lost further
    up.
    """
    layers = {name: pruned.get_submodule(name) for name in step.layers}
    first = next(iter(layers.values()))
    biased = first._parameters.get("bias") is not None
    starts = []
    for layer in layers.values():
        start = as_matrix(layer).double()  # type: ignore[union-attr]
        starts.append(
            torch.cat([start, layer._parameters["bias"].detach().double()[:, None]], 1)
            if biased
            else start
        )
    calls = len(layers) if len(layers) > 1 else step.calls
    halves = (Moments(), Moments())
    for batch in batches:
        before = _see(original, list(layers), batch, calls, stream=step.stream)
        after = _see(pruned, list(layers), batch, calls, stream=step.stream)
        if len(before) != len(after) or (len(layers) > 1 and len(before) != calls):
            continue  # the batch takes other ways through the two models
        for i in range(0, len(before), len(layers)):
            x = exact(rows(first, after[i].given))  # [N, K]
            targets = []
            for whole, part, outputs in zip(
                before[i:], after[i:], step.layers.values(), strict=False
            ):
                y = _outputs(first, whole.output, outputs)
                both = (
                    whole.stream is not None
                    and part.stream is not None
                    and whole.stream.shape == part.stream.shape
                )
                if both and outputs is None:
                    y = y + _outputs(first, whole.stream - part.stream, None)
                targets.append(y)
            y = torch.cat(targets, 1)  # [N, out]
            if len(y) != len(x):
                continue  # the two models route other rows here
            if biased:
                x = torch.cat([x, x.new_ones(len(x), 1)], 1)
            middle = len(x) // 2
            halves[0].add(x[:middle], y[:middle])
            halves[1].add(x[middle:], y[middle:])
    total = halves[0] + halves[1]
    if total.count == 0:
        return
    if not (torch.isfinite(total.outer).all() and torch.isfinite(total.cross).all()):
        raise ValueError(
            f"calibration gives layer {next(iter(layers))!r} inputs or outputs that are not finite"
        )
    weights = fit_weight(halves, torch.cat(starts), bias=biased).split(
        [len(start) for start in starts]
    )
    for layer, weight in zip(layers.values(), weights, strict=True):
        _write(layer, *((weight[:, :-1], weight[:, -1]) if biased else (weight, None)))


def _outputs(layer: nn.Module, output: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """A layer's output as rows [N, out], of the kept channels."""
    spatial = len(layer.kernel_size) if isinstance(layer, (nn.Conv1d, nn.Conv2d)) else 0
    channel = output.ndim - 1 - spatial
    y = exact(output.movedim(channel, -1).reshape(-1, output.shape[channel]))
    return y if kept is None else y[:, kept]


def reestimate(
    original: nn.Module,
    pruned: nn.Module,
    name: str,
    outputs: torch.Tensor | None,
    batches: Iterable[Any],
    calls: int,
) -> None:
    """Shift and scale a BatchNorm's running statistics so that each channel's output has the mean
    and variance it had.

    Where the original's statistics are those of its inputs, this is the usual re-estimation (Jordan
    et al., arXiv 2211.08403); where they are not (a frozen norm), the difference stays what it was.
    """
    norm = pruned.get_submodule(name)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for model, kept in ((original, outputs), (pruned, None)):
        count, total, square = (
            0,
            torch.zeros((), dtype=torch.float64),
            torch.zeros((), dtype=torch.float64),
        )
        for batch in batches:
            for call_ in _see(model, [name], batch, calls):
                x = call_.given
                x = x.movedim(1, -1).reshape(-1, x.shape[1]).double()
                x = x if kept is None else x[:, kept]
                count, total, square = count + len(x), total + x.sum(0), square + (x * x).sum(0)
        if count < 2:
            return
        mean = total / count
        seen.append((mean, (square / count - mean**2).clamp(min=0)))
    (old_mean, old_variance), (new_mean, new_variance) = seen
    ratio = torch.where(
        old_variance > 1e-12, new_variance / old_variance.clamp(min=1e-12), 1.0
    ).clamp(1e-3, 1e3)
    shift = (old_mean - norm.running_mean.double()) * ratio.sqrt()
    norm.running_mean.copy_(new_mean - shift)
    norm.running_var.copy_(((norm.running_var.double() + norm.eps) * ratio - norm.eps).clamp(min=0))


@torch.no_grad()
def repair_layers(
    original: nn.Module,
    pruned: nn.Module,
    steps: Sequence[Step],
    batches: Iterable[Any],
    say: Callable[[str], None],
) -> None:
    """Refit or re-estimate, in place, the layers named in `steps`, in that order."""
    for number, step in enumerate(steps, 1):
        name, outputs = next(iter(step.layers.items()))
        say(f"repairing {', '.join(step.layers)} ({number}/{len(steps)})")
        if isinstance(pruned.get_submodule(name), nn.modules.batchnorm._BatchNorm):
            reestimate(original, pruned, name, outputs, batches, step.calls)
        else:
            refit(original, pruned, step, batches)
