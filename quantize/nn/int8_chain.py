"""Programs of int8 convolutions as they are called, and those that follow each other as one.

A program holds as long as the layers in it are those that it was made of. In what `tape` records of
a forward, a program that alone reads another one's result is joined to it: between them no Python
runs, and images stay in the kernel's order.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantize.native import conv
from quantize.native import int8 as native_int8
from quantize.nn import int8_kernels as kernels
from quantize.nn.floats import averaged
from quantize.nn.int8_conv import Int8Conv
from quantize.nn.int8_plan import Plan, planned
from quantize.nn.int8_program import SOURCE, Op
from quantize.nn.int8_tracer import Unfit
from quantize.nn.tape import Named, Step

_MOST_SHAPES = 16  # of inputs whose plans are kept
_SIDES = (12, 48, 96)  # of inputs that a program is tried on, the smallest that fits
_POOL = nn.AdaptiveAvgPool2d(1)


class Program:
    """What a region runs, as long as all that its forward depends on stays as it was.

    Args:
        ops: of its forward.
        shape: of the inputs that they are for; None: of any.
        forward: what runs in its place where there is no plan.
    """

    def __init__(
        self,
        ops: Sequence[Op],
        shape: torch.Size | None,
        forward: Callable[[Tensor], Tensor],
    ) -> None:
        self.ops, self.shape, self.forward = ops, shape, forward
        self.layers: list[Int8Conv] = [op.module for op in ops if op.has_weights]
        self.tensors: list[Tensor] = []  # of the layers, when their packs were made,
        self.state: tuple[list[int], list[int]] | None = None  # and what tells of changes
        self.packs: list[conv.Packed | None] = []
        self.vectors: list[tuple[conv.Packed, tuple[Tensor | None, ...]]] = []  # that these hold
        self.plans: dict[tuple[torch.Size, bool, int], Plan | None] = {}

    def __call__(self, x: Tensor) -> Tensor:
        found = self.run(x) if kernels.native_allowed() else None
        return self.forward(x) if found is None else found

    def run(self, x: Tensor) -> Tensor | None:
        """The result, or None where there is no plan for inputs of this shape."""
        plan = self._plan_of(x)
        return None if plan is None else plan.run(x)

    def has_plan(self, x: Tensor) -> bool:
        """Can it run on inputs like x?"""
        return self._plan_of(x) is not None

    def _plan_of(self, x: Tensor) -> Plan | None:
        self._pack()
        key = x.shape, conv.channels_last(x), torch.get_num_threads()
        if key not in self.plans:
            if len(self.plans) >= _MOST_SHAPES:
                self.plans.clear()
            self.plans[key] = self._plan(x)
        return self.plans[key]

    def _pack(self) -> None:
        """Bring what the kernel reads up to date with the layers."""
        buffers = chain.from_iterable(layer._buffers.values() for layer in self.layers)
        tensors = [one for one in buffers if one is not None]
        same = len(tensors) == len(self.tensors) and all(map(operator.is_, tensors, self.tensors))
        if same and self.state is not None and self.state == _state(tensors):
            # another layer may hold the same weight, and have been called with another bias
            if all(own.vectors is given for own, given in self.vectors):
                return
        self.tensors = tensors
        self.state = None if any(map(Tensor.is_inference, tensors)) else _state(tensors)
        self.packs = [_packed(op) if op.has_weights else None for op in self.ops]
        self.vectors = [(own, own.vectors) for own in self.packs if own is not None]
        self.plans.clear()

    def _plan(self, x: Tensor) -> Plan | None:
        layers = [None if own is None else own.layer for own in self.packs]
        try:
            return planned(self.ops, layers, x)
        except (Unfit, ValueError, MemoryError):  # the module's forward says what is wrong
            return None

    def fits(self) -> bool:
        """May its layers be read by native code, each with a weight of its own?"""
        weights = [layer.packed for layer in self.layers]
        alone = len({id(weight) for weight in weights}) == len(weights)
        on_cpu = all(weight.device.type == "cpu" for weight in weights)
        short = all(w[0].numel() <= native_int8.MOST_INPUTS for w in weights)
        return alone and on_cpu and short and not any(w.is_inference() for w in weights)

    def is_exact(self) -> bool:
        """Does it give the bits of the forward, in both orders of channels?"""
        for shape in self._shapes():
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            orders = [x.clone()]
            if x.dim() > 3:
                orders.append(x.clone(memory_format=conv.LAST[x.dim()]))
            try:
                expected = [self.forward(one) for one in orders]
            except (RuntimeError, ValueError):  # it is smaller than a kernel
                continue
            kept = all(torch.equal(one, x) for one in orders)  # a forward may change its input
            found = [self.run(one) for one in orders]
            return kept and all(map(_same, found, expected))
        return False

    def _shapes(self) -> Iterator[tuple[int, ...]]:
        """Of inputs to try it on, until one is large enough."""
        if self.shape is not None:
            yield self.shape
            return
        first = next(op.module for op in self.ops if op.x == SOURCE and op.has_weights)
        for side in _SIDES:
            yield 2, first.in_channels, *[side] * len(first.kernel_size)


def _state(tensors: list[Tensor]) -> tuple[list[int], list[int]]:
    """What tells whether one of them was changed."""
    return [*map(_version, tensors)], [*map(Tensor.data_ptr, tensors)]


_version = operator.attrgetter("_version")


def _packed(op: Op) -> conv.Packed:
    layer = op.module
    found = conv.packed(layer.packed, op.geometry)
    found.with_vectors(layer.scale, layer.bias)
    return found


def _same(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.stride() == b.stride() and torch.equal(a, b)


# ------------------------------------------------------------------------------------------------
# programs that follow each other


def joined(
    steps: Sequence[Step], outputs: Sequence[int], values: Sequence[Any], seen: Mapping[int, Tensor]
) -> list[Step]:
    """The steps of a tape, with programs and int8 convolutions that follow each other as one. See
    `nodes.Reading` for the arguments.
    """
    counts = Counter([*outputs, *chain.from_iterable(step.reads for step in steps)])
    found, programs = list[Step](), dict[int, tuple[int, Program]]()  # by the place of the result
    for step in steps:
        program = _program_of(step, seen)
        alone = bool(step.reads) and counts[step.reads[0]] == 1
        before = programs.get(step.reads[0]) if alone else None
        at, both = len(found), program
        if before is not None and _pads_nothing(step, values):
            at, both = before
        elif before is not None and program is not None:
            whole = _both(before[1], program)
            at, both = (before[0], whole) if whole.fits() else (at, both)
        if both is None:
            found.append(step)
            continue
        programs[step.to] = at, both
        reads = found[at].reads if at < len(found) else step.reads[:1]
        found[at : at + 1] = [Step(both, reads, step.to)]
    return found


def _program_of(step: Step, seen: Mapping[int, Tensor]) -> Program | None:
    """The program that a step runs; an int8 convolution is one of a single operation."""
    if isinstance(step.call, Program):
        return step.call
    x = seen.get(step.reads[0]) if step.reads else None
    if step.call is averaged and x is not None and x.dtype is torch.float32:
        size = seen[step.to].shape[2:]
        return Program([Op(_POOL, SOURCE)], None, _POOL) if tuple(size) == (1, 1) else None
    layer = getattr(step.call, "__self__", None)
    if type(layer) is not Int8Conv or layer.floats or layer.padding_mode != "zeros":
        return None
    if x is None or x.dtype is not torch.float32 or x.dim() != len(layer.kernel_size) + 2:
        return None
    made = Program([Op(layer, SOURCE, layer.ending)], None, layer.forward)
    return made if made.fits() else None


def _pads_nothing(step: Step, values: Sequence[Any]) -> bool:
    """Does it add no numbers around its input?"""
    call = step.call.func if isinstance(step.call, Named) else step.call
    return call is F.pad and not any(values[step.reads[1]])


def _both(first: Program, second: Program) -> Program:
    """One program after the other. Whoever asks for it has to see changes of their modules."""
    many = len(first.ops)

    def moved(value: int) -> int:
        return many - 1 if value == SOURCE else many + value

    ops = list(first.ops)
    for op in second.ops:
        ops.append(op.moved(moved))
    return Program(ops, None, lambda x: second(first(x)))
