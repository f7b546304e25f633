"""A tape's steps with stretches of them in one native call each: what lies between is calls of
torch. A stretch of many rows runs slice by slice, where no slice reads another one's numbers.

All numbers are computed as by the steps one after the other, so the bits are the same.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from quantize.native.program import LINEARS, NUMBER, Program, Work, place
from quantize.nn import int8_kernels as kernels
from quantize.nn.floats import has_code
from quantize.nn.int8_plan import Arena
from quantize.nn.nodes import Node, Reading
from quantize.nn.tape import Step, Tape

_FEWEST_ROWS = 96  # of int8 layers in a slice, so that each weight read is worth it


class Stretch:
    """A call of a program on tensors, which gives a list of results.

    Args:
        program: on blocks of memory: the tensors, then the results.
        forms: shapes and strides of the results.
        plain: the steps that it stands for; they run where it can't.
        fixed: those among the tensors that are the same in each call.
    """

    def __init__(
        self,
        program: Program,
        forms: Sequence[tuple[Sequence[int], Sequence[int]]],
        plain: Tape,
        fixed: Sequence[Tensor],
    ) -> None:
        self.program, self.forms, self.plain = program, forms, plain
        owned = [*chain.from_iterable(work.owned for work in program.works)]
        self.owned = [*owned, *fixed]  # other memory may hold another dtype
        self.weights = [one for one in owned if one.dtype is torch.int8]
        self.pointers, self.versions = self._pointers(), self._versions()

    def _pointers(self) -> list[int]:
        return [*map(Tensor.data_ptr, self.owned)]

    def _versions(self) -> list[int]:
        return [*map(_version, self.weights)]

    def __call__(self, *tensors: Tensor) -> Any:
        current = self.pointers == self._pointers() and self.versions == self._versions()
        if not current or not kernels.is_free():
            return self.plain.run(tensors)
        make = torch.empty_strided
        results = [make(*form, dtype=torch.float32, device="cpu") for form in self.forms]
        self.program.run([*map(Tensor.data_ptr, (*tensors, *results))])
        return results


_version = operator.attrgetter("_version")


def stretched(
    steps: Sequence[Step], outputs: Sequence[int], values: Sequence[Any], seen: Mapping[int, Tensor]
) -> list[Step]:
    """The steps, with what native programs can do in stretches as long as can be; see `Reading` for
    the arguments.
    """
    return _Schedule(Reading(steps, outputs, values, seen)).steps() if has_code() else [*steps]


class _Schedule:
    """An order of steps and nodes in which nodes follow each other."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.free = len(reading.values)  # the first free place
        calls = [step for step in reading.steps if not self._is_inside(step)]
        self.needed = {*reading.outputs, *chain.from_iterable(step.reads for step in calls)}
        kept = {step.to for step in calls}
        for step in reversed(reading.steps):
            if reading.is_soft(step) and step.to in self.needed:
                kept.add(step.to)
                self.needed.update(step.reads)
        ordered = [step.to for step in reading.steps]
        nodes = reading.nodes
        self.order = [p for p in ordered if p in kept or p in nodes]

    def _is_inside(self, step: Step) -> bool:
        return step.to in self.reading.covered or self.reading.is_soft(step)

    def steps(self) -> list[Step]:
        """All of them."""
        nodes, makers = self.reading.nodes, self.reading.makers
        self.waiting = set(makers)  # places whose values aren't there
        found, order = list[Step](), self.order
        while order:
            left = list[int]()
            for at in order:
                if at in nodes or self.waiting.intersection(makers[at].reads):
                    left.append(at)
                else:
                    found.append(makers[at])
                    self.waiting.discard(at)
            stretch, order = self._ready(left), left
            if stretch:
                order = [at for at in left if at not in stretch]
                found += self._stretch([nodes[at] for at in stretch])
        return found

    def _ready(self, order: Sequence[int]) -> list[int]:
        """Nodes that can run now, one after the other."""
        found = list[int]()
        for at in order:
            node = self.reading.nodes.get(at)
            if node is not None and not self.waiting.intersection(self._roots(node)):
                found.append(at)
                self.waiting.difference_update(node.results)
        return found

    def _roots(self, node: Node) -> list[int]:
        """Places of the tensors that a node reads, or reads views of."""
        return list(dict.fromkeys(map(self._root, node.reads())))

    def _root(self, tensor: Tensor) -> int:
        """The place of a tensor, or of the one that it is a view of."""
        return self.reading.root(self.reading.place_of[id(tensor)])

    def _stretch(self, nodes: Sequence[Node]) -> list[Step]:
        """Steps that run these nodes."""
        inside = [*chain.from_iterable(node.results for node in nodes)]
        roots = dict.fromkeys(chain.from_iterable(map(self._roots, nodes)))
        given = [root for root in roots if root not in inside]
        others = [other for other in self.reading.nodes.values() if other not in nodes]
        read = self.needed.union(*(self._roots(other) for other in others))
        results = [result for result in inside if result in read]
        to, self.free = self.free, self.free + 1
        steps = [Step(self._call(nodes, given, results), tuple(given), to)]
        for index, result in enumerate(results):
            steps.append(Step(operator.itemgetter(index), (to,), result))
        return steps

    def _call(self, nodes: Sequence[Node], given: list[int], results: list[int]) -> Stretch:
        """What gives these results of the nodes from tensors at the places `given`."""
        seen = self.reading.seen
        ends = [*given, *results]
        slices = self._slices(nodes)
        known = {root: place(block) for block, root in enumerate(ends)}
        arena, works = Arena(), list[Work]()
        places = list[list[int | None]]()
        last = dict[int, int]()
        for at, node in enumerate(nodes):
            last.update(dict.fromkeys(self._roots(node), at))
        for at, node in enumerate(nodes):
            for result in node.results:
                if result not in known:
                    size = seen[result].nbytes // slices
                    known[result] = place(len(ends), arena.take(size))
            for work in node.works:
                works.append(work)
                made = [known[result] + work.at * NUMBER for result in node.results]
                places.append([*(self._place(known, one) for one in work.reads), *made])
            for root, end in last.items():
                if end == at and root not in ends:
                    arena.give(known[root] & (1 << 40) - 1, seen[root].nbytes // slices)
        forms = [(seen[result].shape, seen[result].stride()) for result in results]
        fixed = [one for one in map(self.reading.values.__getitem__, given) if one is not None]
        plain = self._plain(given, results)
        return Stretch(Program(works, places, arena.size, slices), forms, plain, fixed)

    def _slices(self, nodes: Sequence[Node]) -> int:
        """Into how many slices the work of these nodes is cut, each for one thread."""
        works = [*chain.from_iterable(node.works for node in nodes)]
        rows = max((work.units for work in works if work.kind == LINEARS), default=0)
        threads, most = torch.get_num_threads(), rows // _FEWEST_ROWS
        common = math.gcd(*(work.units for work in works))
        fitting = [n for n in range(most, 1, -1) if common % n == 0]
        slices = next(iter(fitting), 1)
        return slices if slices >= threads and self._are_apart(nodes) else 1

    def _are_apart(self, nodes: Sequence[Node]) -> bool:
        """Is every tensor that these nodes make cut in the same places by all that write or read
        it? Views that go through all of its units, a unit's bytes at a time, stay within a unit.
        """
        made = set(chain.from_iterable(node.results for node in nodes))
        for node in nodes:
            for work in node.works:
                reads = [None if one is None else self._root(one) for one in work.reads]
                for root, stride in zip([*reads, *node.results], work.strides, strict=True):
                    if root in made and stride * work.units != self.reading.seen[root].nbytes:
                        return False
        return True

    def _place(self, known: Mapping[int, int], tensor: Tensor | None) -> int | None:
        """Where a tensor lies that is, or is a view of, one at a known place."""
        if tensor is None:
            return None
        root = self._root(tensor)
        return known[root] + tensor.data_ptr() - self.reading.seen[root].data_ptr()

    def _plain(self, given: Sequence[int], results: Sequence[int]) -> Tape:
        """The steps that give these results from tensors at the places `given`."""
        wanted, kept = set(results), list[Step]()
        for step in reversed(self.reading.steps):
            if step.to in wanted and step.to not in given:
                kept.append(step)
                wanted.update(step.reads)
        after = len(given)
        moved = {root: at for at, root in enumerate(given)}

        def there(at: int) -> int:
            return moved.get(at, at + after)

        steps = [Step(s.call, tuple(map(there, s.reads)), there(s.to)) for s in reversed(kept)]
        form = pytree.tree_flatten([0] * len(results))[1]
        values = [*[None] * after, *self.reading.values]
        return Tape(steps, values, [there(result) for result in results], form)
