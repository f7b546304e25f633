"""What each layer of a model sees: sums over its inputs, whether it runs at all, and the order in
which layers run.

Sums of rows are in `sums`; memory is bounded by the width of a layer and not by the data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from quantize.calibration.inputs import call, check_batches, first_given, run_batch, watching
from quantize.calibration.patches import CONVOLUTIONS, channel_rows, is_finite, rows, sample
from quantize.calibration.projected import ProjectedStatistics
from quantize.calibration.sums import InputStatistics, Products


def on_input(layer: nn.Module, see: Callable[[Tensor], None]) -> Any:
    """Call `see` with the (first) input of `layer` whenever it runs; returns the hook's handle."""
    return layer.register_forward_pre_hook(
        lambda _, args, kwargs: see(first_given(args, kwargs)),
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
        if not seen.finite:
            raise ValueError(f"calibration gives layer {name!r} inputs that are not finite")


def reached(model: nn.Module, batches: Iterable[Any], layers: Mapping[str, nn.Module]) -> set[str]:
    """Those of `layers` that some batch runs on at least one row; see `input_shapes`."""
    return set(input_shapes(model, batches, layers))


@torch.no_grad()
def input_shapes(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, nn.Module],
    note_result: Callable[[Any], object] = id,
) -> dict[str, set[tuple[int, ...]]]:
    """The shapes of the inputs, those without rows and packed sequences left out, of the `layers`
    (name to module) that some batch runs, in eval mode. note_result: is called with what the model
    returns for each batch.

    Raises ValueError for a batch that the model doesn't run on, and naming a layer whose inputs are
    not finite.
    """
    found: dict[str, set[tuple[int, ...]]] = {}

    def see(name: str) -> Callable[[Any], None]:
        def note(x: Any) -> None:
            packed = isinstance(x, PackedSequence)
            if not is_finite(x.data if packed else x):
                raise ValueError(f"calibration gives layer {name!r} inputs that are not finite")
            if not packed and x.numel():
                found.setdefault(name, set()).add(tuple(x.shape))

        return note

    with watching([on_input(layer, see(name)) for name, layer in layers.items()], model):
        for number, batch in enumerate(check_batches(batches)):
            note_result(run_batch(model, batch, number))
    return found


class InputSums:
    """Input statistics of layers, summed in every pass that is run while its hooks are there.

    Args:
        layers: by name.
        outer: second moments too. They are of patches from a grid over a convolution's outputs
            where a call has more than `PATCHES_PER_COLUMN` patches for each of their columns.
        by_channel: convolutions whose rows are the channels at each position, not patches.
        projected: weights [M, K] of those layers of which `ProjectedStatistics` are wanted.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        *,
        outer: bool = True,
        by_channel: Collection[str] = (),
        projected: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.layers = layers
        self.outer = outer
        self.by_channel = by_channel
        self.statistics = {name: InputStatistics() for name in layers}
        self.products = Products()
        for name, weight in (projected or {}).items():
            self.statistics[name] = ProjectedStatistics(weight=weight)

    def hooks(self) -> list[Any]:
        """Handles of the hooks on the layers."""
        handles = []
        for name, layer in self.layers.items():
            seen = self.statistics[name]
            if isinstance(seen, ProjectedStatistics):
                note = partial(_note_both, seen)
                handles.append(layer.register_forward_hook(note, with_kwargs=True))
            else:
                handles.append(on_input(layer, partial(self._note, name)))
        return handles

    def _note(self, name: str, x: Tensor) -> None:
        layer, seen = self.layers[name], self.statistics[name]
        with torch.no_grad():
            if name in self.by_channel:
                seen.update(channel_rows(layer, x), outer=self.outer)
            elif not self.outer:
                seen.update(rows(layer, x), outer=False)
            elif isinstance(layer, CONVOLUTIONS):
                seen.update(*sample(layer, x))
            else:
                self.products.see(x)
                seen.update(rows(layer, x), product=self.products.square)


@torch.no_grad()
def _note_both(
    seen: ProjectedStatistics, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor
) -> None:
    """Add what one call of a layer was given and gave."""
    x = first_given(args, kwargs)
    if isinstance(layer, CONVOLUTIONS):
        patches, count = sample(layer, x)
        seen.update_both(patches, patches @ seen.weight.to(patches.dtype).T, count)
    else:
        seen.update_both(rows(layer, x), rows(layer, output))


@torch.no_grad()
def run_all(model: nn.Module, batches: Iterable[Any], hooks: Sequence[Any]) -> None:
    """Run a model in eval mode on batches while these hooks, which are removed then, see it."""
    with watching(hooks, model):
        for batch in batches:
            call(model, batch)


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, nn.Module],
    *,
    outer: bool = True,
) -> dict[str, InputStatistics]:
    """Input statistics of each layer of `model` in `layers` (name to module) over all batches, in
    eval mode; see `InputSums`.

    Raises ValueError for empty batches, for a layer no batch reaches, and for inputs that are not
    finite (naming the layer).
    """
    check_batches(batches)
    sums = InputSums(layers, outer=outer)
    run_all(model, batches, sums.hooks())
    check_reached(sums.statistics)
    return sums.statistics


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
    latest: list[Tensor] = field(default_factory=list)  # the last input, if groups go on

    def note(self, name: str, x: Tensor) -> None:
        """A layer runs on `x`."""
        self.counts[name] = self.counts.get(name, 0) + 1
        if self.counts[name] > 1:
            self.latest.clear()
            return
        if self.latest and self.latest[0] is x:
            self.groups[-1].append(name)
        else:
            self.groups.append([name])
        self.latest[:] = [x]
        self.shapes[name] = tuple(x.shape)


def trace_calls(model: nn.Module, batch: Any, layers: Mapping[str, nn.Module]) -> Calls:
    """Run `model` on one batch and note when each of `layers` runs; layers that don't run are in no
    group.
    """
    calls = Calls()
    hooks = [on_input(layer, partial(calls.note, name)) for name, layer in layers.items()]
    run_all(model, [batch], hooks)
    return calls
