"""Make the layers that read pruned channels give what they gave before, from calibration inputs,
without training.

Layer by layer in the order of the graph: keep moments of the pruned layer's inputs and their
product with the original layer's outputs, solve a ridge regression, write the new weight and bias.
Later layers see what the earlier, already repaired ones give. Memory is bounded by the square of a
layer's input width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.calibration import CONVOLUTIONS, Call, Pace, Regression, Survey, Walk, exact, rows
from quantize.nn import write_weight
from quantize.saying import Say

MOST_INPUTS = 1 << 26  # bytes of a layer's inputs that are kept for the BatchNorm after it


@dataclass
class Step:
    """Layers to repair at once: they read the same tensor, one after another.

    layers: the outputs that each keeps, by index (None: all). calls: how often the layer runs in a
        pass, if it is only one.
    stream: its output is added to a residual stream.
    norm: a BatchNorm that reads what its only layer gives, and the channels that this keeps.
    """

    layers: dict[str, Tensor | None]
    calls: int = 1
    stream: bool = False
    norm: tuple[str, Tensor | None] | None = None


def as_matrix(module: nn.Module) -> Tensor | None:
    """Weight of a layer as [out, K], K in the order of `calibration.rows`; None for a layer that
    can't be refitted.
    """
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    if isinstance(module, CONVOLUTIONS):
        return weight.detach().flatten(1) if module.groups == 1 else None
    if weight.ndim == 2 and hasattr(module, "in_features"):
        return weight.detach()
    if weight.ndim == 2 and hasattr(module, "nf"):  # GPT-2's Conv1D
        return weight.detach().T
    return None


def is_repairable(module: nn.Module) -> bool:
    """May it be a layer of a `Step`?"""
    return as_matrix(module) is not None or isinstance(module, nn.modules.batchnorm._BatchNorm)


def matrix_rows(module: nn.Module, channels: Tensor) -> Tensor:
    """Columns of `as_matrix` that belong to input channels [...], as [..., columns per channel]."""
    size = 1
    if isinstance(module, CONVOLUTIONS):
        size = module.weight[0, 0].numel()
    return channels[..., None] * size + torch.arange(size)


def refit(
    walk: Walk, original: nn.Module, pruned: nn.Module, step: Step
) -> tuple[_Spread, _Spread] | None:
    """Refit layers of `pruned` to the outputs (those kept) of the same layers of `original`.

    In a stream, what is fitted is the sum: the layer also makes up for what the stream lost further
    up. Returns what the BatchNorm of the step is given in the two models, where that is known.
    """
    layers = {name: pruned.get_submodule(name) for name in step.layers}
    first = next(iter(layers.values()))
    regression = Regression(bias=first._parameters.get("bias") is not None)
    streams = step.layers if step.stream else ()
    known = step.norm is not None and step.calls == 1
    spreads = (_Spread(), _Spread())
    inputs: list[Tensor] = []  # of every batch, as long as they are few
    for before, after in walk.show((original, pruned), step.layers, streams):
        names = [call.name for call in before]
        if names != [call.name for call in after] or (len(layers) > 1 and names != list(layers)):
            known = False
            continue  # the batch takes other ways through the two models
        for i in range(0, len(before), len(layers)):
            together = slice(i, i + len(layers))
            x = exact(rows(first, after[i].input))  # [N, K]
            y = _targets(first, step, before[together], after[together])  # [N, out]
            if len(y) == len(x):  # else the two models route other rows here
                regression.add(x, y)
        if known:
            spreads[0].add(before[0].output)  # type: ignore[arg-type]  # the original's is there
            inputs.append(after[0].input)
            known = sum(x.nbytes for x in inputs) <= MOST_INPUTS
    if regression.count == 0:
        return None
    if not regression.finite():
        raise ValueError(
            f"calibration gives layer {next(iter(layers))!r} inputs or outputs that are not finite"
        )
    starts: list[Any] = [as_matrix(layer) for layer in layers.values()]
    sizes = [len(start) for start in starts]
    weight, bias = regression.fit(torch.cat(starts))
    weights = weight.split(sizes)
    biases = [None] * len(sizes) if bias is None else bias.split(sizes)
    for layer, its_weight, its_bias in zip(layers.values(), weights, biases, strict=True):
        write_weight(layer, its_weight, its_bias)
    if not known:
        return None
    for x in inputs:
        spreads[1].add(first(x))
    return spreads


def _targets(layer: nn.Module, step: Step, before: Sequence[Call], after: Sequence[Call]) -> Tensor:
    """What layers that read one tensor are to give together, [N, out]; all are of the kind of
    `layer`.
    """
    targets = []
    for whole, part, kept in zip(before, after, step.layers.values(), strict=True):
        output: Any = whole.output  # the pass of the original goes as far as that
        y = _outputs(layer, output, kept)
        if kept is None:
            y = y + _stream_error(layer, whole.stream, part.stream)
        targets.append(y)
    return torch.cat(targets, 1)


def _stream_error(layer: nn.Module, wanted: Tensor | None, found: Tensor | None) -> Tensor | float:
    """How far the stream that a layer's output joins is from the original's; 0 if it joins none."""
    if wanted is None or found is None or wanted.shape != found.shape:
        return 0.0
    return _outputs(layer, wanted - found, None)


def _outputs(layer: nn.Module, output: Tensor, kept: Tensor | None) -> Tensor:
    """A layer's output as rows [N, out], of the kept channels."""
    spatial = len(layer.kernel_size) if isinstance(layer, CONVOLUTIONS) else 0
    channel = output.ndim - 1 - spatial
    if kept is not None:
        output = output.index_select(channel, kept)
    return exact(output.movedim(channel, -1).reshape(-1, output.shape[channel]))


def reestimate(
    walk: Walk,
    original: nn.Module,
    pruned: nn.Module,
    name: str,
    outputs: Tensor | None,
) -> None:
    """`rescale` a BatchNorm from passes over the two models."""
    old, new = _Spread(), _Spread()
    for before, after in walk.show((original, pruned), [name]):
        for call in before:
            old.add(call.input)
        for call in after:
            new.add(call.input)
    rescale(pruned.get_submodule(name), old, new, outputs)


def rescale(norm: Any, old: _Spread, new: _Spread, outputs: Tensor | None) -> None:
    """Shift and scale a BatchNorm's running statistics so that each channel's output has the mean
    and variance it had.

    Where the original's statistics are those of its inputs, this is the usual re-estimation (Jordan
    et al., arXiv 2211.08403); where they are not (a frozen norm), the difference stays what it was.
    """
    if min(old.count, new.count) < 2:
        return
    kept = slice(None) if outputs is None else outputs
    mean, variance = old.mean[kept], old.variance[kept]
    ratio = new.variance / variance.clamp(min=1e-12)
    ratio = torch.where(variance > 1e-12, ratio, 1.0).clamp(1e-3, 1e3)
    shift = (mean - norm.running_mean.double()) * ratio.sqrt()
    norm.running_mean.copy_(new.mean - shift)
    spread = (norm.running_var.double() + norm.eps) * ratio
    norm.running_var.copy_((spread - norm.eps).clamp(min=0))


@dataclass
class _Spread:
    """Sums over the values of each channel: of each part its mean, and what is about it."""

    count: int = 0
    total: Any = 0.0  # [C], float64
    squares: Any = 0.0  # [C], sum of the squared means of parts
    within: Any = 0.0  # [C], sum of squared distances from the means of parts

    def add(self, x: Tensor) -> None:
        """Add a part x [B, C, ...]."""
        count = x.numel() // x.shape[1]
        if count == 0:
            return
        values = exact(x)
        others = [dim for dim in range(x.ndim) if dim != 1]
        mean = values.mean(others, keepdim=True)
        variance = (values - mean).square_().mean(others)  # `torch.var` takes twice as long
        mean = mean.flatten().double()
        self.count += count
        self.total = self.total + count * mean
        self.squares = self.squares + count * mean.square()
        self.within = self.within + count * variance.double()

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        between = self.squares / self.count - self.mean**2
        return (between + self.within / self.count).clamp(min=0)


@torch.no_grad()
def repair_layers(
    original: nn.Module,
    pruned: nn.Module,
    steps: Sequence[Step],
    survey: Survey,
    say: Say,
) -> None:
    """Refit or re-estimate, in place, the layers named in `steps`, in that order.

    survey: of the original; its look has all repairable layers.
    """
    layers = list(itertools.chain.from_iterable(step.layers for step in steps))
    layers += [step.norm[0] for step in steps if step.norm is not None]
    walk = Walk(original, survey.batches, layers, look=survey.look)
    pace = Pace(len(steps))
    for step in steps:
        say(pace.next(f"repairing {', '.join(step.layers)}"))
        name, outputs = next(iter(step.layers.items()))
        if isinstance(pruned.get_submodule(name), nn.modules.batchnorm._BatchNorm):
            reestimate(walk, original, pruned, name, outputs)
        else:
            _refit_with_norm(walk, original, pruned, step)
        walk.finish(step.layers)


def _refit_with_norm(walk: Walk, original: nn.Module, pruned: nn.Module, step: Step) -> None:
    """`refit`, and the BatchNorm that comes next."""
    spreads = refit(walk, original, pruned, step)
    if step.norm is None:
        return
    walk.finish(step.layers)
    norm, outputs = step.norm
    if spreads is None:
        reestimate(walk, original, pruned, norm, outputs)
    else:
        rescale(pruned.get_submodule(norm), *spreads, outputs)
    walk.finish([norm])
