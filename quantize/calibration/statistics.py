"""What each layer of a model sees: sums over the rows of its inputs, and the order in which layers
run.

Statistics are sums, so memory is bounded by the width of a layer and not by the data. `collect`:
inputs of one model.
`PairedStatistics`: inputs in a compressed model beside those in the original. `trace_calls`: which
    layers run when, on what.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from quantize.calibration.inputs import call, check_batches, watching
from quantize.calibration.patches import channel_rows, exact, gram, rows, sample


@dataclass
class InputStatistics:
    """Sums over the rows a layer has seen; K is the layer's input width (see `rows`).

    Rows x are summed as x - shift, with the mean of the first ones as the shift: in inputs that
    hardly vary, sums of squares would leave nothing but rounding errors of the covariance.
    """

    count: int = 0
    shift: Any = None  # [K]; like all sums here, a tensor from the first update on
    total: Any = 0.0  # [K], sum of x - shift
    outer: Any = 0.0  # [K, K], sum of (x - shift) (x - shift)^T
    largest: Any = 0.0  # [K], max of |x|

    def update(
        self,
        x: torch.Tensor,
        count: int | None = None,
        *,
        outer: bool = True,
        product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Add rows x [N, K] as a sample of `count` rows (default: all of them).

        product: gives x^T x of rows minus a shift, from both.
        """
        if x.numel() == 0:
            return
        x = exact(x)
        count = x.shape[0] if count is None else count
        times = count / x.shape[0]
        self.count += count
        magnitude = x.abs().amax(0)
        self.largest = (
            torch.maximum(self.largest, magnitude) if torch.is_tensor(self.largest) else magnitude
        )
        x = self.shifted(x)
        self.total = self.total + times * x.sum(0)
        if outer:
            square = gram(x) if product is None else product(x, self.shift)
            self.outer = self.outer + (square if times == 1 else times * square)

    def shifted(self, x: torch.Tensor) -> torch.Tensor:
        """Rows x - shift, [N, K]."""
        if self.shift is None:
            self.shift = x.mean(0, dtype=torch.float64).to(x.dtype)
        return x - self.shift

    @property
    def from_shift(self) -> torch.Tensor:
        """E[x] - shift, [K], float64."""
        return self.total.double() / self.count

    @property
    def mean(self) -> torch.Tensor:
        """E[x], [K], float64."""
        return self.shift.double() + self.from_shift

    @property
    def covariance(self) -> torch.Tensor:
        """E[x x^T] - E[x] E[x]^T, [K, K], float64."""
        return self.outer.double() / self.count - torch.outer(self.from_shift, self.from_shift)

    @property
    def second_moment(self) -> torch.Tensor:
        """E[x x^T], [K, K], float64."""
        return self.covariance + torch.outer(self.mean, self.mean)

    @property
    def power(self) -> torch.Tensor:
        """E[x^2], [K], float64."""
        variance = self.outer.diagonal().double() / self.count - self.from_shift**2
        return variance + self.mean**2


@dataclass
class PairedStatistics(InputStatistics):
    """Inputs x of a layer in the compressed model, and r of the same layer in the original, row by
    row.
    """

    reference_shift: Any = None  # [K]
    reference_total: Any = 0.0  # [K], sum of r - reference_shift
    cross: Any = 0.0  # [K, K], sum of (r - reference_shift) (x - shift)^T

    def update_pair(self, x: torch.Tensor, reference: torch.Tensor) -> None:
        """Add rows x and r: [N, K] each. Where the two models route rows differently (shapes
        differ), r counts as x.
        """
        if x.numel() == 0:
            return
        if reference.shape != x.shape:
            reference = x
        self.update(x)
        x, reference = self.shifted(exact(x)), exact(reference)
        if self.reference_shift is None:
            self.reference_shift = reference.mean(0, dtype=torch.float64).to(reference.dtype)
        reference = reference - self.reference_shift
        dtype = torch.promote_types(x.dtype, reference.dtype)
        self.reference_total = self.reference_total + reference.sum(0)
        self.cross = self.cross + reference.T.to(dtype) @ x.to(dtype)

    @property
    def reference_mean(self) -> torch.Tensor:
        """E[r], [K], float64."""
        return self.reference_shift.double() + self.reference_total.double() / self.count

    @property
    def cross_covariance(self) -> torch.Tensor:
        """E[r x^T] - E[r] E[x]^T, [K, K], float64."""
        from_shift = self.reference_total.double() / self.count
        return self.cross.double() / self.count - torch.outer(from_shift, self.from_shift)

    @property
    def cross_moment(self) -> torch.Tensor:
        """E[r x^T], [K, K], float64."""
        return self.cross_covariance + torch.outer(self.reference_mean, self.mean)


def _on_input(layer: nn.Module, see: Callable[[torch.Tensor], None]) -> Any:
    """Call `see` with the (first) input of `layer` whenever it runs; returns the hook's handle."""
    return layer.register_forward_pre_hook(
        lambda _, args, kwargs: see(args[0] if args else next(iter(kwargs.values()))),
        with_kwargs=True,
    )


def check_reached(statistics: Mapping[str, InputStatistics]) -> None:
    """Raise ValueError naming a layer that no batch has reached, or whose inputs were not
    finite.
    """
    for name, seen in statistics.items():
        if seen.count == 0:
            raise ValueError(
                f"calibration never reaches layer {name!r}: give batches that use it, or skip it"
            )
        if not torch.isfinite(seen.largest).all():
            raise ValueError(f"calibration gives layer {name!r} inputs that are not finite")


def reached(model: nn.Module, batches: Iterable[Any], layers: Mapping[str, nn.Module]) -> set[str]:
    """Those of `layers` that some batch runs on at least one row; see `input_shapes`."""
    return set(input_shapes(model, batches, layers))


@torch.no_grad()
def input_shapes(
    model: nn.Module, batches: Iterable[Any], layers: Mapping[str, nn.Module]
) -> dict[str, set[tuple[int, ...]]]:
    """The shapes of the inputs, those without rows and packed sequences left out, of the `layers`
    (name to module) that some batch runs, in eval mode.

    Raises ValueError for a batch that the model doesn't run on, and naming a layer whose inputs are
    not finite.
    """
    found: dict[str, set[tuple[int, ...]]] = {}

    def see(name: str) -> Callable[[Any], None]:
        def note(x: Any) -> None:
            packed = isinstance(x, PackedSequence)
            if not torch.isfinite(x.data if packed else x).all():
                raise ValueError(f"calibration gives layer {name!r} inputs that are not finite")
            if not packed and x.numel():
                found.setdefault(name, set()).add(tuple(x.shape))

        return note

    with watching([_on_input(layer, see(name)) for name, layer in layers.items()], model):
        for number, batch in enumerate(check_batches(batches)):
            try:
                call(model, batch)
            except (
                TypeError,
                RuntimeError,
                IndexError,
                KeyError,
                AttributeError,
                AssertionError,
            ) as error:
                which = "the first batch" if number == 0 else f"batch {number}"
                reason = f"{type(error).__name__}: {error}"
                raise ValueError(
                    f"{type(model).__name__} doesn't run on {which} of calibration: {reason}"
                ) from error
    return found


@torch.no_grad()
def collect(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, nn.Module],
    *,
    outer: bool = True,
    by_channel: Collection[str] = (),
) -> dict[str, InputStatistics]:
    """Input statistics of each layer of `model` in `layers` (name to module) over all batches, in
    eval mode.

    outer: second moments too. They are of patches from a grid over a convolution's outputs where a
    call has more than `PATCHES_PER_COLUMN` patches for each of their columns. by_channel:
    convolutions whose rows are the channels at each position, not patches.

    Raises ValueError for empty batches, for a layer no batch reaches, and for inputs that are not
    finite (naming the layer).
    """
    check_batches(batches)
    statistics = {name: InputStatistics() for name in layers}
    shared = _SharedProduct()

    def see(name: str, layer: nn.Module) -> Callable[[torch.Tensor], None]:
        seen = statistics[name]

        def note(x: torch.Tensor) -> None:
            if not outer:
                seen.update(rows(layer, x), outer=False)
            elif name in by_channel:
                seen.update(channel_rows(layer, x))
            elif isinstance(layer, (nn.Conv1d, nn.Conv2d)):
                seen.update(*sample(layer, x))
            else:
                shared.see(x)
                seen.update(rows(layer, x), product=shared.of)

        return note

    with watching([_on_input(layer, see(name, layer)) for name, layer in layers.items()], model):
        for batch in batches:
            call(model, batch)
    check_reached(statistics)
    return statistics


class _SharedProduct:
    """The product of the rows of one input, for layers that read it one after another."""

    def __init__(self) -> None:
        self.given: torch.Tensor | None = None
        self.version = 0
        self.shift: torch.Tensor | None = None
        self.product: torch.Tensor | None = None

    def see(self, given: torch.Tensor) -> None:
        """The input of the layer that runs now."""
        version = -1 if given.is_inference() else given._version
        if self.given is not given or self.version != version or version < 0:
            self.given, self.version, self.product = given, version, None

    def of(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """`gram` of x, the rows of that input minus `shift`."""
        same = self.shift is not None and torch.equal(shift, self.shift)
        if self.product is None or not same:
            self.shift, self.product = shift, gram(x)
        return self.product


@dataclass
class Calls:
    """What one batch shows: layers in the order in which they first run, in groups that run one
    after another on one input.
    """

    groups: list[list[str]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)  # calls of each layer in the pass
    shapes: dict[str, tuple[int, ...]] = field(
        default_factory=dict
    )  # of the input of the first call


@torch.no_grad()
def trace_calls(model: nn.Module, batch: Any, layers: Mapping[str, nn.Module]) -> Calls:
    """Run `model` on one batch and note when each of `layers` runs; layers that don't run are in no
    group.
    """
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
