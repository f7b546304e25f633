"""What a layer that is to be fitted gets from the compressed model, beside what it got and gave in
the original one.

Left out: layers between whose output and the residual stream something else happens (a norm, a
scale); they are fitted to their own output alone, since an error of the stream can't be undone
before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from quantize import calibration as calibrate


@dataclass
class Seen(calibrate.PairedStatistics):
    """Sums over rows of a layer's inputs x [K] and r [K] in the two models, and of the error e [M]
    of what its output joins.
    """

    error_total: torch.Tensor | float = 0.0  # [M]
    error: torch.Tensor | float = 0.0  # [M, K], sum of e (x - shift)^T

    def update_error(self, x: torch.Tensor, error: torch.Tensor) -> None:
        """Add rows x [N, K], e [N, M]."""
        self.error_total = self.error_total + error.sum(0)
        self.error = self.error + error.T @ self.shifted(calibrate.exact(x)).double()

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
        return (
            None
            if self.error_mean is None
            else self.error_covariance + torch.outer(self.error_mean, self.mean)
        )


class _Enough(BaseException):
    """Ends a forward pass whose remaining layers nobody watches."""


@dataclass(eq=False)
class _Call:
    name: str
    x: torch.Tensor
    output: torch.Tensor
    leaf: (
        torch.Tensor | None
    )  # the output's own gradient would arrive here; for telling whether something depends on it
    stream: torch.Tensor | None = None  # what the output was added to


class _Watch(TorchFunctionMode):
    """Notes the calls of some layers of a model, and for those in `streams` what their outputs are
    then added to.

    last: the layer after which the pass may end. strict: what was computed from the output itself
    doesn't count (GELU's x + 0.04 x^3); to know, the pass runs with gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        streams: Iterable[str],
        *,
        last: str | None = None,
        strict: bool = False,
    ):
        super().__init__()
        self.model, self.names, self.streams, self.last, self.strict = (
            model,
            list(names),
            set(streams),
            last,
            strict,
        )
        self.calls: list[_Call] = []
        self.waiting: list[_Call] = []  # for their additions

    def run(self, batch: Any) -> list[_Call]:
        """The calls in a pass over `batch`, in eval mode."""
        self.calls, self.waiting = [], []
        hooks = [
            self.model.get_submodule(n).register_forward_hook(self._hook(n), with_kwargs=True)
            for n in self.names
        ]
        with calibrate.watching(hooks, self.model), self if self.streams else nullcontext():
            try:
                calibrate.call(self.model, batch)
            except _Enough:
                pass
        return self.calls

    def _hook(self, name: str) -> Any:
        def note(
            _module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor
        ) -> torch.Tensor:
            x = args[0] if args else next(iter(kwargs.values()))
            leaf = output.detach().requires_grad_() if self.strict else None
            output = output if leaf is None else leaf.clone()
            self.calls.append(
                _Call(name, x.detach().clone(), output, leaf)
            )  # a clone: the next layer may write into its input
            if name in self.streams:
                self.waiting.append(self.calls[-1])
            elif name == self.last:
                raise _Enough
            return output

        return note

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if (
            self.waiting
            and not kwargs
            and len(args) == 2
            and getattr(function, "__name__", "") in _ADDITIONS
        ):
            for ours, other in (args, args[::-1]):
                if not (
                    isinstance(ours, torch.Tensor)
                    and isinstance(other, torch.Tensor)
                    and ours.shape == other.shape
                ):
                    break
                call = next(
                    (
                        c
                        for c in self.waiting
                        if _is_same(c.output, ours) and not _is_same(c.output, other)
                    ),
                    None,
                )
                if call is not None and not (self.strict and _depends(other, call.leaf)):
                    call.stream = other.detach().clone()
                    self.waiting.remove(call)
                    if call.name == self.last:
                        raise _Enough
        return function(*args, **(kwargs or {}))


_ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """One tensor, or views of it of one shape (dropout in eval mode gives such)."""
    return a.shape == b.shape and a.stride() == b.stride() and a.data_ptr() == b.data_ptr()


def _depends(y: torch.Tensor, x: torch.Tensor | None) -> bool:
    if not y.requires_grad:
        return False
    try:
        return torch.autograd.grad(y.sum(), x, retain_graph=True, allow_unused=True)[0] is not None
    # something was computed in place after it was used: only what lies between the two is asked for
    except RuntimeError:
        return True


@torch.enable_grad()
def find_streams(model: nn.Module, batch: Any, names: Iterable[str]) -> set[str]:
    """Those of the layers `names` whose output is added to another tensor of its shape whenever the
    layer runs.
    """
    calls = _Watch(model, names, names, strict=True).run(batch)
    return {call.name for call in calls} - {call.name for call in calls if call.stream is None}


@torch.no_grad()
def collect(
    model: nn.Module,
    reference: nn.Module,
    batches: Iterable[Any],
    names: Sequence[str],
    streams: set[str],
    *,
    last: str | None,
) -> dict[str, Seen]:
    """What the layers `names` see in `model`, paired with the same layers in `reference`, row by
    row.

    streams: see `find_streams`. last: the layer of `names` that runs last, when each runs once a
    pass: passes end there. A layer that no batch reaches in `model`, or whose inputs there aren't
    finite, is missing from the result.
    """
    seen = {name: Seen() for name in names}
    watches = [
        _Watch(root, names, streams.intersection(names), last=last) for root in (model, reference)
    ]
    for batch in batches:
        passes = [watch.run(batch) for watch in watches]
        for name in names:
            calls, others = ([call for call in run if call.name == name] for run in passes)
            if len(calls) != len(others):
                others = calls  # the two models take other ways on this batch
            layer = model.get_submodule(name)
            for call, other in zip(calls, others, strict=True):
                x, r = calibrate.rows(layer, call.x), calibrate.rows(layer, other.x)
                seen[name].update_pair(x, r)
                if (
                    call.stream is not None
                    and other.stream is not None
                    and call.stream.shape == other.stream.shape
                ):
                    error = other.stream.double() - call.stream.double()
                    error = error.movedim(-3, -1) if isinstance(layer, nn.Conv2d) else error
                    seen[name].update_error(x, error.reshape(-1, error.shape[-1]))
    return {name: s for name, s in seen.items() if s.count and torch.isfinite(s.largest).all()}
