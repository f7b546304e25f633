"""SmoothQuant (Xiao et al., arXiv 2211.10438): move outliers of the activations into the weights,
before both are quantized.

Some channels of a norm's output are many times larger than the rest, and a row's scale must cover
them. Dividing the norm's weight by f and multiplying the columns of the linears behind it by f
changes nothing in floating point, costs nothing when the model runs, and evens the channels out.

Nothing is assumed of the model: which linears alone read which norm is seen in a run (the same
tensor goes out of one and into the others), and a fold stays only if the float model still gives
its outputs. Left out: folding into a linear before the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from quantize import calibration as calibrating

STRENGTH = 0.5  # how much of the imbalance moves into the weights; the paper's middle value
_SAME = 1e-3  # relative error of outputs that a fold doesn't change


def smooth(model: nn.Module, layers: Mapping[str, nn.Linear], batches: Iterable[Any]) -> list[str]:
    """Fold, in place, what can be folded into the norms before `layers`; returns the names of the
    norms that were changed.
    """
    example = next(iter(batches))
    groups = _groups(model, set(layers.values()), example)
    if not groups:
        return []
    names = {layer: name for name, layer in layers.items()}
    statistics = calibrating.collect(
        model, batches, {names[g[0]]: g[0] for g in groups.values()}, outer=False
    )
    expected = outputs(model, [example])
    folds = []
    for name, group in groups.items():
        largest: Any = statistics[names[group[0]]].largest
        folds.append(_Fold(name, model.get_submodule(name), group, largest))
    return _kept(folds, lambda: calibrating.relative_error(outputs(model, [example]), expected))


class _Fold:
    """A factor that goes from a norm into the layers that read it."""

    def __init__(self, name: str, norm: Any, layers: list[nn.Linear], largest: Tensor) -> None:
        weights = [layer.weight.detach().abs().amax(0).float() for layer in layers]
        size = torch.stack(weights).amax(0)
        self.name = name
        self.factor = largest.clamp_min(1e-5) ** STRENGTH / size.clamp_min(1e-5) ** (1 - STRENGTH)
        self.divided = [p for p in (norm.weight, getattr(norm, "bias", None)) if p is not None]
        self.multiplied = [layer.weight for layer in layers]
        self.before = [(p, p.detach().clone()) for p in (*self.divided, *self.multiplied)]

    @torch.no_grad()
    def do(self) -> None:
        for p in self.divided:
            p.div_(self.factor)
        for p in self.multiplied:
            p.mul_(self.factor)

    @torch.no_grad()
    def undo(self) -> None:
        for p, old in self.before:
            p.copy_(old)


def _kept(folds: list[_Fold], error: Callable[[], float]) -> list[str]:
    """Do those folds that change no output, and return their names. One changes outputs where
    somebody else reads the norm too, unseen, or where it is no plain factor. All are tried at once,
    and halves where one of them does.
    """
    for fold in folds:
        fold.do()
    if not folds or error() < _SAME:
        return [fold.name for fold in folds]
    for fold in folds:
        fold.undo()
    if len(folds) == 1:
        return []
    half = len(folds) // 2
    return _kept(folds[:half], error) + _kept(folds[half:], error)


def outputs(model: nn.Module, batches: Iterable[Any]) -> list[Tensor]:
    """All floating point tensors that the model returns for the batches, in eval mode; the model's
    state stays.
    """
    found: list[Tensor] = []
    with calibrating.watching((), model), torch.no_grad():
        for batch in batches:
            found += floating(calibrating.call(model, batch))
    return found


def floating(result: Any) -> list[Tensor]:
    """Copies of the floating point tensors in what a model returns."""
    tensors = calibrating.output_tensors(result)
    return [tensor.clone() for tensor in tensors if tensor.is_floating_point()]


class _Reads(TorchFunctionMode):
    """Sees which layers are given the outputs of norms, and which outputs something else computes
    with (a residual connection).

    Attributes: groups: layers by the name of the norm that they read. shared: names of norms.
    """

    def __init__(self) -> None:
        super().__init__()
        # the tensor is held, so that its identity can't be used again
        self.produced: dict[int, tuple[str, Tensor]] = {}
        self.groups: dict[str, list[Any]] = {}
        self.shared: set[str] = set()
        self.owners: dict[nn.Module, str] = {}
        self.reading = False  # is one of the layers at work?

    def produce(self, name: str) -> Callable[..., None]:
        """A hook of a norm."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self.produced[id(output)] = (name, output)

        return hook

    def begin(self, layer: nn.Module, args: Any) -> None:
        """A hook before a layer."""
        self.reading = True
        name = self.produced.get(id(args[0]), (None,))[0] if args else None
        if name is None:
            return
        group = self.groups.setdefault(name, [])
        if self.owners.setdefault(layer, name) == name and layer not in group:
            group.append(layer)

    def end(self, layer: nn.Module, args: Any, output: Any) -> None:
        """A hook after it."""
        self.reading = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        computed = not self.reading and any(isinstance(one, Tensor) for one in tree_leaves(result))
        for value in tree_leaves((args, kwargs)) if computed else ():
            if id(value) in self.produced:
                self.shared.add(self.produced[id(value)][0])
        return result


def _groups(model: nn.Module, layers: set[nn.Module], example: Any) -> dict[str, list[nn.Linear]]:
    """By the norm's name: the layers that take a norm's output as it is, for norms with a weight as
    wide as the layer whose output nothing else computes with.
    """
    reads = _Reads()
    hooks: list[Any] = []
    for layer in layers:
        hooks.append(layer.register_forward_pre_hook(reads.begin))
        hooks.append(layer.register_forward_hook(reads.end, always_call=True))
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if "norm" in type(module).__name__.lower() and weight is not None and weight.ndim == 1:
            hooks.append(module.register_forward_hook(reads.produce(name)))
    try:
        with reads:
            outputs(model, [example])
    finally:
        for hook in hooks:
            hook.remove()
    alone = {name: group for name, group in reads.groups.items() if name not in reads.shared}
    widths = {name: len(model.get_parameter(f"{name}.weight")) for name in alone}
    return {
        name: group
        for name, group in alone.items()
        if group and all(layer.in_features == widths[name] for layer in group)
    }
