"""Steps of a tape that int8 layers do together: layers that read the same tensor, quantized once,
and a sum or a product that alone reads a layer's result.

Each number is computed as by the steps one after the other, so the bits are the same.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from quantize.native.int8_together import PRODUCT, SUM, Operands, together
from quantize.nn import int8_kernels as kernels
from quantize.nn.tape import Step

_JOINS: dict[Any, int] = {
    **dict.fromkeys((Tensor.add, torch.add), SUM),
    **dict.fromkeys((Tensor.mul, torch.mul), PRODUCT),
}


class Together:
    """A call of several layers on one tensor. activations: of each."""

    def __init__(self, activations: Sequence[str | None]) -> None:
        self.activations = activations

    def layers(self, tensors: Sequence[Any]) -> list[Operands]:
        """From weight, scale and bias of each layer, one after the other."""
        return list(zip(*(tensors[at::3] for at in range(3)), self.activations, strict=True))

    def __call__(self, x: Tensor, *tensors: Any) -> list[Tensor]:
        layers = self.layers(tensors)
        found = together(x, layers) if kernels.is_free() else None
        return found or [kernels.linear(x, w, scale, b, None, a) for w, scale, b, a in layers]


class Joined(Together):
    """A call of a layer whose result is added to another tensor, or multiplied by it (`how`)."""

    def __init__(self, activation: str | None, how: int) -> None:
        super().__init__([activation])
        self.how = how

    def __call__(self, x: Tensor, *tensors: Any) -> Any:
        *own, other = tensors
        if kernels.is_free():
            found = together(x, self.layers(own), self.how, other)
            if found is not None:
                return found[0]
        weight, scale, bias = own
        y = kernels.linear(x, weight, scale, bias, None, self.activations[0])
        return y + other if self.how == SUM else y * other


def joined(
    steps: Sequence[Step], outputs: Sequence[int], values: Sequence[Any], seen: Mapping[int, Tensor]
) -> list[Step]:
    """The steps, fewer where int8 layers can do more.

    Args:
        steps: without gradients, and none changes a tensor.
        outputs: places that are results.
        values: what lies in the places before the first step.
        seen: the tensors that lay in places as the steps were recorded.
    """
    reads = chain.from_iterable(step.reads for step in steps)
    counts = Counter([*outputs, *reads])
    linears = {step.to: step for step in steps if _is_plain(step, values, seen)}
    made: list[Step] = []
    for step in steps:
        how = _JOINS.get(step.call)
        layers = [place for place in step.reads if place in linears and counts[place] == 1]
        if how is None or not layers or not _are_like(step, seen):
            made.append(step)
            continue
        layer = linears.pop(layers[-1])
        made = [other for other in made if other.to != layer.to]
        (other,) = (place for place in step.reads if place != layer.to)
        call = Joined(values[layer.reads[5]], how)
        made.append(Step(call, (*layer.reads[:4], other), step.to))
    return _grouped(made, linears, values, len(values))


def _grouped(
    steps: Sequence[Step], linears: Mapping[int, Step], values: Sequence[Any], place: int
) -> list[Step]:
    """The steps, with layers that read the same tensor in one. place: the first free one."""
    groups: dict[int, list[Step]] = {}
    for layer in linears.values():
        groups.setdefault(layer.reads[0], []).append(layer)
    made: list[Step] = []
    for step in steps:
        group = groups.get(step.reads[0], []) if step.to in linears else []
        if len(group) < 2:
            made.append(step)
        elif step.to == group[0].to:
            call = Together([values[layer.reads[5]] for layer in group])
            tensors = chain.from_iterable(layer.reads[1:4] for layer in group)
            made.append(Step(call, (step.reads[0], *tensors), place))
            for index, layer in enumerate(group):
                made.append(Step(operator.itemgetter(index), (place,), layer.to))
            place += 1
    return made


def _is_plain(step: Step, values: Sequence[Any], seen: Mapping[int, Tensor]) -> bool:
    """Is it an int8 layer without outliers, of float32 rows that lie one after the other?"""
    if step.call is not kernels.linear or values[step.reads[4]] is not None:
        return False
    x = seen[step.reads[0]]
    return x.dtype is torch.float32 and x.is_contiguous()


def _are_like(step: Step, seen: Mapping[int, Tensor]) -> bool:
    """Are its arguments two tensors of the form of its result?"""
    tensors = [seen.get(place) for place in (*step.reads, step.to)]
    if len(set(step.reads)) != 2 or len(tensors) != 3 or any(one is None for one in tensors):
        return False
    shapes = {(one.shape, one.dtype) for one in tensors if one is not None}
    return len(shapes) == 1 and all(one.is_contiguous() for one in tensors if one is not None)
