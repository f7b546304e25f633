"""Programs of int8 convolutions as they are called, and those that follow each other as one.

A program holds as long as the layers in it are those that it was made of. In what `tape` records of
a forward, a program that alone reads another one's result is joined to it: between them no Python
runs, and images stay in the kernel's order.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantize.native import conv
from quantize.native import int8 as native_int8
from quantize.nn import int8_kernels as kernels
from quantize.nn.floats import averaged, mean, pixels_kept
from quantize.nn.int8_conv import Int8Conv, by_pixel
from quantize.nn.int8_plan import Plan, planned
from quantize.nn.int8_program import POOL, SOURCE, Op
from quantize.nn.int8_tracer import ACTIVATIONS, Unfit
from quantize.nn.nodes import COPIES
from quantize.nn.tape import Step, called

_MOST_SHAPES = 16  # of inputs whose plans are kept
_SIDES = (12, 48, 96)  # of inputs that a program is tried on, the smallest that fits
_ROWS = {*COPIES, Tensor.view}


class Program:
    """What a region runs, as long as all that its forward depends on stays as it was; numbers of
    tensors may change.

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
        self.packs: list[conv.Packed] = []  # of these, in their order,
        self.vectors: list[tuple[Tensor | None, ...]] = []  # and what they were called with
        self.plans: dict[tuple[torch.Size, bool, int], Plan | None] = {}

    def __call__(self, x: Tensor) -> Tensor:
        found = self.run(x) if kernels.native_allowed() else None
        return self.forward(x) if found is None else found

    def run(self, x: Tensor) -> Tensor | None:
        """The result, or None where there is no plan for inputs of this shape."""
        plan = self._plan_of(x)
        return None if plan is None else plan.run(x)

    def ending_with(self, last: Op, after: Callable[[Tensor], Tensor]) -> Program:
        """With another last operation, for all shapes. after: what it does besides."""
        return Program([*self.ops[:-1], last], None, lambda x: after(self(x)))

    def has_plan(self, x: Tensor) -> bool:
        """Can it run on inputs like x?"""
        return self._plan_of(x) is not None

    def _plan_of(self, x: Tensor) -> Plan | None:
        self._pack()
        key = x.shape, conv.reads_last(x), torch.get_num_threads()
        if key not in self.plans:
            if len(self.plans) >= _MOST_SHAPES:
                self.plans.clear()
            self.plans[key] = self._plan(x)
        return self.plans[key]

    def _pack(self) -> None:
        """Bring what the kernel reads up to date with the layers, which hold the same tensors."""
        if self.state is not None and self.state == _state(self.tensors):
            # another layer may hold the same weight, and have been called with another bias
            if all(map(operator.is_, map(_vectors, self.packs), self.vectors)):
                return
        buffers = chain.from_iterable(layer._buffers.values() for layer in self.layers)
        self.tensors = [one for one in buffers if one is not None]
        is_seen = not any(map(Tensor.is_inference, self.tensors))
        self.state = _state(self.tensors) if is_seen else None
        self.packs = [_packed(op) for op in self.ops if op.has_weights]
        self.vectors = [own.vectors for own in self.packs]
        self.plans.clear()

    def _plan(self, x: Tensor) -> Plan | None:
        packs = iter(self.packs)
        layers = [next(packs).layer if op.has_weights else None for op in self.ops]
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


_version, _vectors = operator.attrgetter("_version"), operator.attrgetter("vectors")


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
        alone = bool(step.reads) and counts[step.reads[0]] == 1
        before = programs.get(step.reads[0]) if alone else None
        whole = None if before is None else _longer(before[1], step, values, seen)
        if before is not None and whole is not None:
            at, reads = before[0], found[before[0]].reads
        else:
            at, reads = len(found), step.reads[:1]
            whole = _program_of(step, values, seen)
        if whole is not None:
            programs[step.to] = at, whole
            step = Step(whole, reads, step.to)
        found[at : at + 1] = [step]
    return found


def _program_of(step: Step, values: Sequence[Any], seen: Mapping[int, Tensor]) -> Program | None:
    """The program that a step runs; an int8 convolution is one of a single operation."""
    call, arguments, named = called(step, values.__getitem__)
    if isinstance(call, Program):
        return call
    x = seen.get(step.reads[0]) if step.reads else None
    if x is None or x.dtype is not torch.float32:
        return None
    if call is averaged and tuple(seen[step.to].shape[2:]) == (1, 1):
        return Program([Op(POOL, SOURCE)], None, POOL)
    kept = pixels_kept(*arguments[1:], **named) if call is mean and x.dim() == 4 else None
    if kept is not None:
        op = Op(POOL, SOURCE, flat=not kept)
        return Program([op], None, lambda x: x.mean((2, 3), keepdim=kept))
    if call is F.max_pool2d and x.dim() == 4 and x.shape[1] > 1:  # torch is as fast for one channel
        return _pooling(*arguments[1:], **named)
    layer = getattr(call, "__self__", None)
    if type(layer) is not Int8Conv or layer.floats or layer.padding_mode != "zeros":
        return None
    if x.dim() != len(layer.kernel_size) + 2:
        return None
    made = Program([Op(layer, SOURCE, layer.ending)], None, layer.forward)
    return made if made.fits() else None


def _pooling(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Program | None:
    """A call of F.max_pool2d with these arguments; None where no program gives what it gives."""
    if ceil_mode or return_indices:
        return None
    pooling = nn.MaxPool2d(kernel_size, stride or None, padding, dilation)
    return Program([Op(pooling, SOURCE)], None, pooling)


def _longer(
    program: Program, step: Step, values: Sequence[Any], seen: Mapping[int, Tensor]
) -> Program | None:
    """A program, and a step that reads its result, as one; None where they can't be."""
    call, arguments, named = called(step, values.__getitem__)
    if call is F.pad:
        return None if any((*arguments[1:], *named.values())[0]) else program
    before, last = seen[step.reads[0]].shape, program.ops[-1]
    if call in _ROWS and before[2:] == (1, 1) and seen[step.to].shape == before[:2]:
        return program.ending_with(replace(last, flat=True), lambda x: x.flatten(1))
    if call in ACTIVATIONS and not any((*arguments[1:], *named.values())):
        ended = last.ended(ACTIVATIONS[call])
        return None if ended is None else program.ending_with(ended, call)
    second = _program_of(step, values, seen)
    if call is kernels.linear and last.flat:
        second = _head(*arguments[1:])
    if second is None:
        return None
    whole = _both(program, second)
    return whole if whole.fits() else None


def _head(
    weight: Tensor, scale: Tensor, bias: Tensor | None, outliers: Any, activation: str | None
) -> Program | None:
    """An int8 linear layer of [N, C], behind the mean of an image's channels."""
    if outliers is not None:
        return None
    layer = by_pixel(weight, scale, bias, activation)

    def forward(x: Tensor) -> Tensor:
        return kernels.linear(x, weight, scale, bias, None, activation)

    return Program([Op(layer, SOURCE, layer.ending, flat=True)], None, forward)


def _both(first: Program, second: Program) -> Program:
    """One program after the other. Whoever asks for it has to see changes of their modules."""
    many = len(first.ops)

    def moved(value: int) -> int:
        return many - 1 if value == SOURCE else many + value

    ops = list(first.ops)
    for op in second.ops:
        ops.append(op.moved(moved))
    return Program(ops, None, lambda x: second(first(x)))
