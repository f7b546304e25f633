"""Run the user's batches through a model and keep what the techniques need: statistics of what each layer sees.

A batch is what `torch.export.export` takes as example inputs: a tensor, a tuple of positional arguments, or a dict of keyword
arguments. Statistics are sums over rows, so memory is bounded by the width of a layer and not by the data.

`collect`: inputs. `PairedStatistics`: inputs in a compressed model beside those in the original. `collect_gradients`: how the
model's output depends on each layer's output. `trace_calls`: which layers run, in which order, on the same input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def call(model: nn.Module, batch: Any) -> Any:
    """Run `model` on a batch: a tensor, a tuple of positional arguments or a dict of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def check_batches(batches: Iterable[Any], name: str = "calibration") -> Iterable[Any]:
    """Return `batches`; TypeError for an iterator (it could be read only once), ValueError when there is no batch in it."""
    if isinstance(batches, (torch.Tensor, Mapping, str, nn.Module)) or not isinstance(batches, Iterable):
        raise TypeError(f"{name} must be a sequence of batches, got {type(batches).__name__}; for one batch write [batch]")
    if iter(batches) is batches:
        raise TypeError(f"{name} must be re-iterable, got an iterator ({type(batches).__name__}); write list(...)")
    if next(iter(batches), None) is None:
        raise ValueError(f"{name} is empty: at least one batch is needed")
    return batches


def rows(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The vectors that `layer`'s weight multiplies, as [N, K].

    Linear: [..., K] flattened. Conv1d, Conv2d of one group: patches of [B, C, (H,) W], K = C * kernel height * kernel width.
    """
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=_PAD_MODES[layer.padding_mode])
            padding: Any = (0,) * len(layer.kernel_size)
        else:
            padding = layer.padding
        window = (layer.kernel_size, layer.dilation, padding, layer.stride)
        if isinstance(layer, nn.Conv1d):
            x, window = x.unsqueeze(-2), tuple((f, *w) for f, w in zip((1, 1, 0, 1), window, strict=True))
        patches = F.unfold(x, *window)  # [B, K, L]
        return patches.transpose(1, 2).reshape(-1, patches.shape[1])
    return x.reshape(-1, x.shape[-1])


_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


@dataclass
class InputStatistics:
    """Sums over the rows a layer has seen; K is the layer's input width (see `rows`)."""

    count: int = 0
    total: torch.Tensor | float = 0.0  # [K]
    outer: torch.Tensor | float = 0.0  # [K, K], sum of x x^T
    largest: torch.Tensor | float = 0.0  # [K], max of |x|

    def update(self, x: torch.Tensor, *, outer: bool = True) -> None:
        """Add rows x: [N, K]."""
        if x.numel() == 0:
            return
        x = _exact(x)
        self.count += x.shape[0]
        self.total = self.total + x.sum(0)
        if outer:
            self.outer = self.outer + x.T @ x
        magnitude = x.abs().amax(0)
        self.largest = torch.maximum(self.largest, magnitude) if torch.is_tensor(self.largest) else magnitude

    @property
    def mean(self) -> torch.Tensor:
        """E[x], [K]."""
        return self.total / self.count

    @property
    def second_moment(self) -> torch.Tensor:
        """E[x x^T], [K, K]."""
        return self.outer / self.count


@dataclass
class PairedStatistics(InputStatistics):
    """Inputs x of a layer in the compressed model, and r of the same layer in the original, row by row."""

    reference_total: torch.Tensor | float = 0.0  # [K]
    cross: torch.Tensor | float = 0.0  # [K, K], sum of r x^T

    def update_pair(self, x: torch.Tensor, reference: torch.Tensor) -> None:
        """Add rows x and r: [N, K] each. Where the two models route rows differently (shapes differ), r counts as x."""
        if reference.shape != x.shape:
            reference = x
        self.update(x)
        x, reference = _exact(x), _exact(reference)
        self.reference_total = self.reference_total + reference.sum(0)
        self.cross = self.cross + reference.T @ x

    @property
    def reference_mean(self) -> torch.Tensor:
        """E[r], [K]."""
        return self.reference_total / self.count

    @property
    def cross_moment(self) -> torch.Tensor:
        """E[r x^T], [K, K]."""
        return self.cross / self.count


def _exact(x: torch.Tensor) -> torch.Tensor:
    """float32, or float64 where squares of x could leave the range of float32 or x is float64 already."""
    x = x.detach()
    if x.dtype == torch.float64 or (x.dtype != torch.float16 and x.numel() and x.abs().amax() > 1e15):
        return x.double()
    return x.float()


@contextmanager
def watching(hooks: Sequence[Any], *models: nn.Module) -> Iterator[None]:
    """Models in eval mode inside; afterwards their own training flags again and the hooks gone."""
    modes = [(m, m.training) for model in models for m in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training


def _on_input(layer: nn.Module, see: Callable[[torch.Tensor], None]) -> Any:
    """Call `see` with the (first) input of `layer` whenever it runs; returns the hook's handle."""
    return layer.register_forward_pre_hook(
        lambda _, args, kwargs: see(args[0] if args else next(iter(kwargs.values()))), with_kwargs=True
    )


def check_reached(statistics: Mapping[str, InputStatistics]) -> None:
    """Raise ValueError naming a layer that no batch has reached, or whose inputs were not finite."""
    for name, seen in statistics.items():
        if seen.count == 0:
            raise ValueError(f"calibration never reaches layer {name!r}: give batches that use it, or skip it")
        if not torch.isfinite(seen.largest).all():
            raise ValueError(f"calibration gives layer {name!r} inputs that are not finite")


@torch.no_grad()
def collect(
    model: nn.Module, batches: Iterable[Any], layers: Mapping[str, nn.Module], *, outer: bool = True
) -> dict[str, InputStatistics]:
    """Input statistics of each layer of `model` in `layers` (name to module) over all batches, in eval mode.

    Raises ValueError for empty batches, for a layer no batch reaches, and for inputs that are not finite (naming the layer).
    """
    check_batches(batches)
    statistics = {name: InputStatistics() for name in layers}

    def see(name: str, layer: nn.Module) -> Callable[[torch.Tensor], None]:
        return lambda x: statistics[name].update(rows(layer, x), outer=outer)

    with watching([_on_input(layer, see(name, layer)) for name, layer in layers.items()], model):
        for batch in batches:
            call(model, batch)
    check_reached(statistics)
    return statistics


@dataclass
class Calls:
    """What one batch shows: layers in the order in which they first run, in groups that run one after another on one input."""

    groups: list[list[str]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)  # calls of each layer in the pass
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of the input of the first call


@torch.no_grad()
def trace_calls(model: nn.Module, batch: Any, layers: Mapping[str, nn.Module]) -> Calls:
    """Run `model` on one batch and note when each of `layers` runs; layers that don't run are in no group."""
    calls, latest = Calls(), []

    def see(name: str) -> Callable[[torch.Tensor], None]:
        def note(x: torch.Tensor) -> None:
            calls.counts[name] = calls.counts.get(name, 0) + 1
            if calls.counts[name] > 1:
                latest.clear()
                return
            if latest and latest[0] is x:
                calls.groups[-1].append(name)
            else:
                calls.groups.append([name])
            latest[:] = [x]
            calls.shapes[name] = tuple(x.shape)

        return note

    with watching([_on_input(layer, see(name)) for name, layer in layers.items()], model):
        call(model, batch)
    return calls


# Gradients: how much the model's output cares about each direction of a layer's output.


def main_output(output: Any) -> torch.Tensor:
    """The tensor that a model's output is about: `logits` if it has them, else the first floating tensor in it."""
    if isinstance(output, torch.Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    for part in output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ():
        if isinstance(part, torch.Tensor) and part.is_floating_point():
            return part
    raise TypeError(f"the model returns {type(output).__name__}, in which no floating tensor is found")


def fisher_loss(output: Any, *, categories: bool, generator: torch.Generator) -> torch.Tensor:
    """A scalar whose gradients' second moment is the Fisher information of the model's main output.

    categories: the output is logits, and labels are drawn from the model's own distribution (Martens, arXiv 1412.1193), in
    nats summed over rows; otherwise values with unit Gaussian noise, so that squared changes of the output count.
    """
    logits = main_output(output).float()
    if not categories:
        noise = torch.randn(logits.shape, generator=generator).to(logits.device)
        return (logits * noise).sum()
    logits = logits.reshape(-1, logits.shape[-1])
    labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(logits.device)
    return F.cross_entropy(logits, labels, reduction="sum")


def collect_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, nn.Module],
    *,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """E[g g^T], [M, M], of the gradients g with respect to each layer's outputs (rows as in `rows`), over all batches.

    loss(output, batch) is a scalar summed over its rows; by default `fisher_loss`, with categories where the output is named
    logits or is as wide as a vocabulary embedding. A layer that the loss doesn't depend on is missing from the result. No
    parameter's `.grad` is touched.
    """
    check_batches(batches)
    generator = torch.Generator().manual_seed(seed)
    vocabularies = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    moments: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    outputs: list[tuple[str, torch.Tensor]] = []

    def see(name: str) -> Callable[..., torch.Tensor]:
        def keep(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            outputs.append((name, output))
            return output.clone()  # the original stays as it is when the next layer works in place

        return keep

    hooks = [layer.register_forward_hook(see(name)) for name, layer in layers.items()]
    with watching(hooks, model), torch.enable_grad():
        for batch in batches:
            outputs.clear()
            output = call(model, batch)
            if loss is not None:
                value = loss(output, batch)
            else:
                named = not isinstance(output, torch.Tensor) and hasattr(output, "logits")
                categories = named or main_output(output).shape[-1] in vocabularies
                value = fisher_loss(output, categories=categories, generator=generator)
            if not value.requires_grad:
                continue
            gradients = torch.autograd.grad(value, [o for _, o in outputs], allow_unused=True)
            for (name, _), gradient in zip(outputs, gradients, strict=True):
                if gradient is None:
                    continue
                if isinstance(layers[name], nn.Conv2d):
                    gradient = gradient.movedim(1, -1)  # [B, M, H, W] to [B, H, W, M]
                g = _exact(gradient).reshape(-1, gradient.shape[-1])
                moments[name] = moments.get(name, 0) + g.T @ g
                counts[name] = counts.get(name, 0) + g.shape[0]
    return {name: moment / counts[name] for name, moment in moments.items()}
