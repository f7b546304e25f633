"""Steps of a tape that one native program does (`native.program`): which they are, and what each
becomes.

Int8 layers do the activation, the sum or the product that alone reads their result; those of one
input are one step. Views are strides, and take no step.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quantize.native import program
from quantize.native.program import ALONE, DIFFERENCE, PRODUCT, SUM, Work
from quantize.nn import int8_kernels as kernels
from quantize.nn.floats import GELUS, OWN, Own
from quantize.nn.tape import Step, called, is_gathering

_SUMS: dict[Any, int] = {
    **dict.fromkeys((Tensor.add, torch.add), SUM),
    **dict.fromkeys((Tensor.mul, torch.mul), PRODUCT),
    **dict.fromkeys((Tensor.sub, torch.sub), DIFFERENCE),
}
# Activations that may change their input, by what is called.
_IN_PLACE: dict[Any, str] = {
    **dict.fromkeys((torch.relu, Tensor.relu, F.relu), "relu"),
    OWN[F.silu]: "silu",
}
COPIES = {Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten, Tensor.contiguous}


@dataclass
class Node:
    """Native work in the place of steps.

    Args:
        works: of one result, or a work of several int8 layers.
        results: places; of each layer.
        covers: places of the results of the steps that it does.
        layers: of int8 layers that do nothing else, their places of weight, scale and bias, and
            their activations.
    """

    works: list[Work]
    results: list[int]
    covers: set[int]
    layers: list[program.Operands]

    def reads(self) -> list[Tensor]:
        """All tensors that the works read."""
        tensors = chain.from_iterable(work.reads for work in self.works)
        return [one for one in tensors if one is not None]


class Reading:
    """What is known of the steps of a tape.

    Args:
        steps: without gradients, and none changes a tensor.
        outputs: places that are results.
        values: what lies in the places before the first step.
        seen: the tensors that lay in places as the steps were recorded.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        outputs: Sequence[int],
        values: Sequence[Any],
        seen: Mapping[int, Tensor],
    ) -> None:
        self.steps, self.outputs, self.values, self.seen = steps, outputs, values, seen
        self.makers = {step.to: step for step in steps}
        self.place_of = {id(tensor): place for place, tensor in seen.items()}
        self.owned = {id(value) for value in values if isinstance(value, Tensor)}
        self.counts = Counter([*outputs, *chain.from_iterable(step.reads for step in steps)])
        self.readers = dict[int, Step]()
        for step in steps:
            self.readers.update(dict.fromkeys(step.reads, step))
        self.sources: dict[int, int] = {}  # of views, by their places
        self.lists = {step.to: step for step in steps if is_gathering(step)}
        for step in steps:
            self._note_view(step)
        self.nodes: dict[int, Node] = {}  # by the place of the last result that they cover
        self.covered: set[int] = set()
        for step in steps:
            self._note_node(step)
        self._group()

    # ------------------------------------------------------------------------------- views

    def _is_constant(self, place: int) -> bool:
        return place not in self.seen and place not in self.makers

    def _note_view(self, step: Step) -> None:
        """Does it give a part of its first argument's memory, whatever its numbers are?"""
        if is_gathering(step) or not step.reads or not all(map(self._is_constant, step.reads[1:])):
            return
        first = step.reads[0]
        if isinstance(step.call, operator.itemgetter) and first in self.lists:
            first = self.lists[first].reads[0]
        if first not in self.seen:
            return
        if step.to not in self.seen:
            self.lists[step.to] = step
        elif _memory(self.seen[step.to]) == _memory(self.seen[first]):
            self.sources[step.to] = first

    def is_soft(self, step: Step) -> bool:
        """Is it needed only where something else than a node reads its result?"""
        return step.to in self.sources or step.to in self.lists

    def root(self, place: int) -> int:
        """The place of the tensor that this one is a view of."""
        while place in self.sources:
            place = self.sources[place]
        return place

    # ------------------------------------------------------------------------------- nodes

    def _value(self, place: int) -> Any:
        if place in self.seen:
            return self.seen[place]
        if place in self.lists and is_gathering(self.lists[place]):
            return [self._value(part) for part in self.lists[place].reads]
        if place in self.makers:
            raise LookupError(place)
        return self.values[place]

    def _note_node(self, step: Step) -> None:
        if step.to in self.covered or self.is_soft(step) or step.to not in self.seen:
            return
        try:
            found = self._node(step)
        except (LookupError, TypeError, ValueError, RuntimeError):
            return  # arguments that torch's function may take
        if found is None:
            return
        owned = chain.from_iterable(work.owned for work in found.works)
        inside = all(id(one) in self.owned for one in owned)
        if inside and all(id(one) in self.place_of for one in found.reads()):
            self.nodes[max(found.covers)] = found
            self.covered |= found.covers

    def _node(self, step: Step) -> Node | None:
        if step.call is kernels.linear:
            return self._linear(step)
        call, arguments, named = called(step, self._value)
        result, works = self.seen[step.to], list[Work | None]()
        lies = result
        if isinstance(call, Own):
            works = [call.work(*arguments, **named)]
            lies = result.transpose(1, 2) if call.by_position else result
        elif call in _SUMS and len(arguments) == 2 and not named:
            if all(isinstance(one, Tensor) for one in arguments):
                works = [program.each(*arguments, how=_SUMS[call])]
        elif call in COPIES:
            works = [program.each(arguments[0])]
        elif call is torch.cat:
            works = _parts(result, *arguments, **named)
        found = [work for work in works if work is not None]
        fits = result.dtype is torch.float32 and lies.is_contiguous()
        if not found or len(found) < len(works) or not fits:
            return None
        return Node(found, [step.to], {step.to}, [])

    def _reader(self, place: int) -> Step | None:
        """The one step that reads a result, if nothing else does."""
        found = self.readers.get(place)
        alone = self.counts[place] == 1 and found is not None and found.to not in self.covered
        return found if alone else None

    def _linear(self, step: Step) -> Node | None:
        x, *vectors, outliers, activation = (self._value(place) for place in step.reads)
        if outliers is not None:
            return None
        covers, how, other = {step.to}, ALONE, None
        reader = self._reader(step.to)
        if reader is not None and activation is None:
            activation = self._activation(reader)
            if activation is not None:
                covers.add(reader.to)
        end = max(covers)
        reader = self._reader(end)
        if reader is not None and _SUMS.get(reader.call) in (SUM, PRODUCT):
            others = [self.seen.get(place) for place in reader.reads if place != end]
            if len(others) == 1 and others[0] is not None and self._are_like(reader, others[0]):
                (other,), how = others, _SUMS[reader.call]
                covers.add(reader.to)
        layer = (*vectors, activation)
        work = program.linears(x, [layer], how, other)
        if work is None:
            return None
        return Node([work], [max(covers)], covers, [layer] if how == ALONE else [])

    def _activation(self, step: Step) -> str | None:
        """The name of the activation that a step is, if an int8 layer can do it."""
        call, arguments, named = called(step, self._value)
        if call in _IN_PLACE:
            changes = (*arguments[1:], *named.values(), False)[0]
            return None if changes else _IN_PLACE[call]
        if call is OWN[F.gelu]:
            return GELUS[(*arguments[1:], *named.values(), "none")[0]]
        return None

    def _are_like(self, step: Step, other: Tensor) -> bool:
        """Has the other argument of a sum the form of its result?"""
        result = self.seen[step.to]
        return result.shape == other.shape and result.is_contiguous() and other.is_contiguous()

    def _group(self) -> None:
        """Let layers that read the same tensor be one node."""
        groups: dict[int, list[int]] = {}
        for place, node in self.nodes.items():
            if node.layers:
                groups.setdefault(id(node.works[0].reads[0]), []).append(place)
        for places in groups.values():
            members = [self.nodes[place] for place in places[: program.MOST_LAYERS]]
            layers = [*chain.from_iterable(member.layers for member in members)]
            work = program.linears(members[0].works[0].reads[0], layers)  # type: ignore[arg-type]
            if len(members) < 2 or work is None:
                continue
            for place in places[: program.MOST_LAYERS]:
                del self.nodes[place]
            results = [member.results[0] for member in members]
            covers = set().union(*(member.covers for member in members))
            self.nodes[places[0]] = Node([work], results, covers, layers)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _parts(result: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> list[Work | None]:
    """The copies that `torch.cat` makes."""
    strides, found, at = result.stride(), list[Work | None](), 0
    for tensor in tensors:
        fits = isinstance(tensor, Tensor) and tensor.dim() == result.dim()
        found.append(program.each(tensor, y=strides, at=at) if fits else None)
        at += tensor.shape[dim] * strides[dim]
    return found
