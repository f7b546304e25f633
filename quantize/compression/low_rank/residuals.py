"""What a layer that is to be fitted gets from the compressed model, beside what it is to give."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantize import calibration as calibrate
from quantize.calibration import Call, Walk
from quantize.nn import low_rank as pairs


@dataclass
class Seen(calibrate.PairedStatistics):
    """Sums over rows of a layer's inputs x [K] in the compressed model, and beside each row the
    original's input r [K], or what the layer is to give, y [M], whichever is narrower.

    y is what the original layer gives, plus what is missing in the stream that its output joins.
    """

    is_target: bool = False  # the other rows are y

    def target_moment(self, weight: Tensor, *, centred: bool) -> Tensor:
        """E[y x^T], or the covariance, [M, K], of a layer of this weight [M, K]; a layer with a
        bias is asked for the covariance.
        """
        cross = self.cross_covariance if centred else self.cross_moment
        return cross if self.is_target else weight @ cross

    def target_mean(self, weight: Tensor, bias: Tensor) -> Tensor:
        """E[y], [M]."""
        return self.other_mean if self.is_target else bias + weight @ self.other_mean

    def fit(
        self, weight: Tensor, *, centred: bool, floor: float
    ) -> tuple[Tensor, Tensor | calibrate.Outer]:
        """The weight [M, K], float64, that comes closest to giving y from x, held to `weight`; and
        the moment of x, [K, K].

        centred: x and y count less their means. floor: on the diagonal of the moment.
        """
        moment = self.moment(centred=centred, floor=floor)
        if isinstance(moment, calibrate.Outer):
            x, z = self.few_rows(centred=centred)
            gap = z - x @ weight.T if self.is_target else (z - x) @ weight.T
            halves = self.first_half
            fitted = calibrate.compensate_rows(weight, moment, gap, halves, centred=centred)
            return fitted, moment
        target = self.target_moment(weight, centred=centred)
        target = torch.add(target, weight, alpha=floor)
        return calibrate.compensate(weight, moment, target), moment


def collect(
    walk: Walk,
    model: nn.Module,
    reference: nn.Module,
    names: Collection[str],
    streams: set[str],
) -> dict[str, Seen]:
    """What the layers `names` see in `model`, paired with the same layers in `reference`, row by
    row.

    Args:
        walk: of the reference, at these layers.
        model: the compressed one, in which these layers are as in the reference.
        streams: see `calibration.find_streams`.

    Returns:
        By name, without layers that no batch reaches in `model`, or whose inputs there aren't
        finite.
    """
    layers: Mapping[str, Any] = {name: model.get_submodule(name) for name in names}
    seen: dict[str, Seen] = {}
    for name, layer in layers.items():
        outputs, inputs = pairs.matrix(layer).shape
        seen[name] = Seen(is_target=outputs < inputs or name in streams)
    products = calibrate.Products()
    for theirs, ours in walk.show((reference, model), names, streams.intersection(names)):
        for name in names:
            calls = [call for call in ours if call.name == name]
            others = [call for call in theirs if call.name == name]
            same_way = len(calls) == len(others)
            for i, call in enumerate(calls):
                _add(seen[name], layers[name], call, others[i] if same_way else None, products)
    return {name: s for name, s in seen.items() if s.count and s.finite}


def _add(
    seen: Seen, layer: Any, call: Call, other: Call | None, products: calibrate.Products
) -> None:
    """Add what one call of `layer` shows, beside the original's `other`.

    Where the two models go other ways, or route other rows to the layer, it is to go on as it does.
    """
    x = calibrate.rows(layer, call.input)
    if other is None or other.input.shape != call.input.shape:
        z = _own_output(layer, x) if seen.is_target else x
        products.see(call.input)
    elif seen.is_target:
        z = _target(layer, call, other)
        products.see(call.input, z)
    else:
        z = calibrate.rows(layer, other.input)
        products.see(call.input, other.input)
    seen.update_pair(x, z, products)


def _own_output(layer: Any, x: Tensor) -> Tensor:
    """What a layer makes of rows x [N, K]: [N, M]."""
    x = calibrate.exact(x)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, pairs.matrix(layer).to(x.dtype), bias)


def _target(layer: nn.Module, call: Call, other: Call) -> Tensor:
    """What the layer is to give, as rows [N, M]."""
    output: Any = other.output  # the pass of the original goes as far as that
    target = calibrate.exact(output)
    if call.stream is not None and other.stream is not None:
        if call.stream.shape == other.stream.shape:
            missing = calibrate.exact(other.stream) - calibrate.exact(call.stream)
            target = target + missing
    if isinstance(layer, pairs.CONVOLUTIONS):
        target = target.movedim(-1 - len(layer.kernel_size), -1)
    return target.reshape(-1, target.shape[-1])
