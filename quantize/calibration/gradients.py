"""How much the model's output cares about each direction of a layer's output: second moments of
gradients (Fisher).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn

from quantize.calibration.differences import BLOCK
from quantize.calibration.dual import whole
from quantize.calibration.inputs import main_output, replaced
from quantize.calibration.patches import CONVOLUTIONS, exact, snapshot
from quantize.calibration.projected import Projected
from quantize.calibration.squares import Squares

Moment = Callable[[], Any]


def fisher_loss(output: Any, *, categories: bool, generator: torch.Generator) -> torch.Tensor:
    """A scalar whose gradients' second moment is the Fisher information of the model's main output.

    categories: the output is logits, and labels are drawn from the model's own distribution
    (Martens, arXiv 1412.1193), in nats summed over rows; otherwise values with unit Gaussian noise,
    so that squared changes of the output count.
    """
    logits = main_output(output).float()
    if not categories:
        noise = torch.randn(logits.shape, generator=generator, dtype=torch.float32).to(
            logits.device
        )
        return (logits * noise).sum()
    return _OwnLabels.apply(logits.reshape(-1, logits.shape[-1]), generator)


class _OwnLabels(torch.autograd.Function):
    """Cross-entropy, summed over rows, of labels that are drawn from logits [N, V] themselves.

    Beside the logits of a large vocabulary it holds one tensor of their size, the gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        gradient = logits.softmax(-1)
        labels = _drawn(gradient, generator).to(logits.device)
        loss = -gradient.gather(1, labels).log().sum()
        ctx.gradient = gradient.scatter_add_(
            1, labels, -torch.ones_like(labels, dtype=gradient.dtype)
        )
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        factor = gradients[0]
        return (ctx.gradient if factor == 1 else ctx.gradient * factor), None


def _drawn(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A column for each row of probabilities [N, V], [N, 1], in blocks of rows."""
    rows = max(1, BLOCK // probabilities.shape[1])
    parts = probabilities.cpu().split(rows)
    return torch.cat([torch.multinomial(part, 1, generator=generator) for part in parts])


class OutputGradients:
    """Second moments of gradients of `fisher_loss` at the outputs of layers, summed in every pass
    that is run while its hooks are there, and followed by `backward`. Categories are outputs that
    are named logits or are as wide as a vocabulary embedding. No parameter's `.grad` is touched.

    Args:
        model: the whole.
        layers: of it, by name.
        projected: weights W [M, K] of linears of which the gradients W^T g at their inputs, fewer
            than those at their outputs, are wanted.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        *,
        projected: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.layers = layers
        self.projected = projected or {}
        self.generator = torch.Generator().manual_seed(0)
        self.vocabularies = {
            module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)
        }
        self.squares: dict[str, Squares] = {}
        self.counts: dict[str, int] = {}
        self.powers: dict[str, float] = {}  # sums of g^2, of projected ones
        self.leaves: list[torch.Tensor] = []

    def hooks(self) -> list[Any]:
        """Handles of the hooks on the layers."""
        handles = []
        for name, layer in self.layers.items():
            see = self._add
            if name in self.projected:
                before = partial(self._tap_input, name)
                handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
                see = self._add_power
            after = partial(self._tap_output, partial(see, name))
            handles.append(layer.register_forward_hook(after))
        return handles

    def _tap_input(
        self, name: str, _module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        see = partial(self._add, name)
        if args:
            return (self._tapped(args[0], see), *args[1:]), kwargs
        key = next(iter(kwargs))
        return args, {**kwargs, key: self._tapped(kwargs[key], see)}

    def _tap_output(
        self, see: Callable, _module: nn.Module, _args: Any, output: torch.Tensor
    ) -> torch.Tensor:
        return self._tapped(output, see)

    def _tapped(self, tensor: torch.Tensor, see: Callable) -> torch.Tensor:
        leaf = torch.zeros((), requires_grad=True)
        self.leaves.append(leaf)
        return _Tap.apply(tensor, leaf, see)

    def _add(self, name: str, gradient: torch.Tensor) -> None:
        layer = self.layers[name]
        if isinstance(layer, CONVOLUTIONS):
            channel = -1 - len(layer.kernel_size)
            gradient = gradient.movedim(channel, -1)  # [B, M, H, W] to [B, H, W, M]
        rows = snapshot(exact(gradient).reshape(-1, gradient.shape[-1]))
        self.squares.setdefault(name, Squares()).add(rows)
        self.counts[name] = self.counts.get(name, 0) + len(rows)

    def _add_power(self, name: str, gradient: torch.Tensor) -> None:
        power = float(exact(gradient).norm()) ** 2
        self.powers[name] = self.powers.get(name, 0.0) + power

    def backward(self, output: Any) -> None:
        """Go back from the loss of what a pass gave."""
        leaves, self.leaves = self.leaves, []
        value = self._value(output)
        if value.requires_grad and leaves:
            torch.autograd.grad(value, leaves, allow_unused=True)

    def _value(self, output: Any) -> torch.Tensor:
        named = not isinstance(output, torch.Tensor) and hasattr(output, "logits")
        main = main_output(output)
        categories = main.ndim > 0 and (named or main.shape[-1] in self.vocabularies)
        return fisher_loss(output, categories=categories, generator=self.generator)

    def result(self) -> dict[str, Moment]:
        """What gives E[g g^T], [M, M], by layer, without those that the loss doesn't depend on: the
        sums that it is made of take half the room.
        """
        moments: dict[str, Moment] = {}
        for name, sums in self.squares.items():
            moments[name] = partial(sums.mean, self.counts[name])
            if name in self.projected:
                moments[name] = partial(self._moment, name)
        return moments

    def _moment(self, name: str) -> Projected:
        weight, count = self.projected[name].T.double(), self.counts[name]
        seen = whole(self.squares[name].mean(count)).double()
        return Projected(weight, seen, self.powers[name] / (count * weight.shape[1]))


class _Tap(torch.autograd.Function):
    """A copy of a tensor; `see` gets the gradient at it when that comes by.

    The copy stays as it is when the next layer works in place.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, leaf: torch.Tensor, see: Callable) -> torch.Tensor:
        ctx.see = see
        return snapshot(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.see(gradients[0])
        return gradients[0], torch.zeros(()), None


def without_weight_gradients(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, no parameter takes a gradient: inputs of layers aren't kept for theirs."""
    fixed = any(parameter.is_inference() for parameter in model.parameters())
    trained = [p for p in model.parameters() if p.is_leaf and p.requires_grad and not fixed]
    return replaced(trained, "requires_grad", False)
