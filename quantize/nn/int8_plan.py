"""The operations of `int8_program` for inputs of one shape: steps that one native call runs, and
where each value lies between them.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantize.native import conv, int8
from quantize.native.conv import Geometry
from quantize.nn.int8_program import SOURCE, Op
from quantize.nn.int8_tracer import Unfit

_ALIGNED = 64  # bytes
_NEAR_BYTES = 1 << 22  # of the nearest cache of two cores
_LARGE_BYTES = 1 << 19  # of a value that doesn't stay there as a whole


class Arena:
    """Where values lie between steps: places in one block, used again after the last reader."""

    def __init__(self) -> None:
        self.size = 0
        self.free: list[tuple[int, int]] = []  # sizes and places

    def take(self, size: int) -> int:
        """A place for so many bytes."""
        size = _whole(size)
        fitting = [piece for piece in self.free if piece[0] >= size]
        if not fitting:
            self.size += size
            return self.size - size
        found = min(fitting)
        self.free.remove(found)
        if found[0] > size:
            self.free.append((found[0] - size, found[1] + size))
        return found[1]

    def give(self, place: int, size: int) -> None:
        """Back, what `take` gave."""
        self.free.append((_whole(size), place))


def _whole(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


@dataclass(frozen=True)
class Plan:
    """What runs for inputs of one shape.

    Args:
        steps: an array, as the kernel reads it.
        shape: of the result of a turn, [N, C] of one without dimensions of size.
        arena: bytes of the values between the steps.
        threads: at most.
        held: what the steps point to.
    """

    steps: Any
    shape: tuple[int, ...]
    arena: int
    threads: int
    held: Sequence[conv.Layer]

    def run(self, x: Tensor) -> Tensor:
        """The result for x, in its memory format: samples in turns of as many as the plan was made
        for. Raises MemoryError.
        """
        last = conv.channels_last(x)
        x = x if conv.reads_last(x) else x.contiguous()
        image = len(self.shape) == x.dim()
        format = conv.LAST[x.dim()] if last and image else torch.contiguous_format
        shape = x.shape[0], *self.shape[1:]
        y = torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=format)
        arena = torch.empty(self.arena, dtype=torch.uint8, device="cpu")
        turns = x.shape[0] // self.shape[0]
        threads = 1 if int8.forked() else self.threads
        apart = x.numel() // turns, y.numel() // turns
        pointers = x.data_ptr(), y.data_ptr(), arena.data_ptr()
        call = conv.Turns(turns, threads, *apart, *pointers)
        address = ctypes.addressof(self.steps)
        if conv.functions().run_program(address, len(self.steps), ctypes.byref(call)):
            raise MemoryError(f"no memory for convolutions of {list(x.shape)}")
        return y


def planned(ops: Sequence[Op], layers: Sequence[conv.Layer | None], x: Tensor) -> Plan:
    """The plan for inputs like x: as many samples in a turn as what lies between its steps fits the
    cache, one at least.

    Raises: Unfit: not for inputs of this shape.
    """
    samples = x.shape[0]
    one = Planner(ops, layers, x, samples=1).plan()
    fitting = max(1, _NEAR_BYTES // max(one.arena, 1))
    most = max(n for n in range(1, samples + 1) if samples % n == 0 and n <= fitting)
    return Planner(ops, layers, x, samples=most).plan()


class Planner:
    """Makes the plan for some samples.

    Args:
        ops: what runs.
        layers: of each convolution among them, as the kernel reads it; None for others.
        x: an input like those that it is for.
        samples: of a turn.

    Raises: Unfit: not for inputs of this shape.
    """

    def __init__(
        self,
        ops: Sequence[Op],
        layers: Sequence[conv.Layer | None],
        x: Tensor,
        *,
        samples: int,
    ) -> None:
        self.ops, self.x_last, self.last = ops, conv.reads_last(x), conv.channels_last(x)
        self.shapes: dict[int, tuple[int, ...]] = {SOURCE: (samples, *x.shape[1:])}
        for at, op in enumerate(ops):
            self.shapes[at] = self._shape(op)
            if op.other is not None and self.shapes[op.other] != self.shapes[at]:
                raise Unfit("a sum of different shapes")
            gate = (*self.shapes[op.x][:2], 1, 1)
            if op.gate is not None and self.shapes[op.gate] != gate:
                raise Unfit("a product with other numbers than one for each channel")
        self.layers = [own or self._pooling(op) for op, own in zip(ops, layers, strict=True)]
        self.threads = int8.threads(sum(map(self._products, range(len(ops)))))
        self.arena, self.steps = Arena(), list[conv.Step]()
        self.places: dict[int, int] = {SOURCE: conv.INPUT}
        self.ranges: dict[int, int] = {}
        self.chains = self._chains()

    def _shape(self, op: Op) -> tuple[int, ...]:
        samples, channels, *size = self.shapes[op.x]
        if op.has_weights:
            if channels != op.module.in_channels:
                raise Unfit("another number of channels")
            channels = op.module.out_channels
        return samples, channels, *op.sizes(size)

    def _pooling(self, op: Op) -> conv.Layer:
        channels = self.shapes[op.x][1]
        return op.geometry.layer(op.kernel, channels, channels)

    def _products(self, at: int) -> int:
        op = self.ops[at]
        if not op.has_weights:
            return math.prod(self.shapes[op.x])
        each: int = op.module.packed[0].numel()
        return math.prod(self.shapes[at]) * each

    def _chains(self) -> dict[int, int]:
        """Operations that run line by line: a depthwise convolution of large images, with those of
        single pixels before and behind it. By the first of them, how many they are.
        """
        found, free = dict[int, int](), 0
        for at, op in enumerate(self.ops):
            if op.kind != conv.DEPTHWISE or len(op.kernel) != 2 or op.geometry.dilation != (1, 1):
                continue
            if max(self._bytes(op.x), self._bytes(at)) < _LARGE_BYTES:
                continue
            first = at - 1 if op.x == at - 1 >= free and self._widens(at - 1) else at
            end = at + 2 if self._narrows(at + 1) else at + 1
            if end - first > 1:
                found[first], free = end - first, end
        return found

    def _widens(self, at: int) -> bool:
        """May what a convolution gives be forgotten once the next operation has read it?"""
        alone = self._readers(at) == [at + 1] and self.ops[at].other is None
        return alone and self._is_by_pixel(at)

    def _narrows(self, at: int) -> bool:
        """Does a convolution read what the operation before gives, and nothing of all its lines?"""
        if at == len(self.ops) or self.ops[at].x != at - 1 or self.ops[at].gate is not None:
            return False
        return self._is_by_pixel(at)

    def _is_by_pixel(self, at: int) -> bool:
        """Is it a convolution of each pixel by itself, whose range nobody asks for?"""
        op = self.ops[at]
        pixels = op.kind == conv.CONVOLUTION and op.geometry.pointwise(op.kernel)
        return pixels and not any(self.ops[reader].needs_range() for reader in self._readers(at))

    def _readers(self, at: int) -> list[int]:
        return [reader for reader, op in enumerate(self.ops) if at in op.reads]

    def _bytes(self, value: int) -> int:
        return 4 * math.prod(self.shapes[value])

    # ------------------------------------------------------------------------------- steps

    def plan(self) -> Plan:
        """All steps."""
        readers = [op for op in self.ops if SOURCE in op.reads]
        alone = len(readers) == 1 and readers[0].kind == conv.CONVOLUTION
        if not self.x_last and not (alone and readers[0].x == SOURCE):
            # only products read channels as planes, at a price that is paid once
            place = self.arena.take(self._bytes(SOURCE))
            self._turn(conv.TO_LAST, SOURCE, conv.INPUT, place)
            self.places[SOURCE] = place
        end, running = 0, list[int]()
        for at in range(len(self.ops)):
            end = max(end, at + self.chains.get(at, 1))
            self._append(at)
            running.append(at)
            if at + 1 == end:  # steps that run line by line read and write at the same time
                for one in running:
                    self._free(one)
                running.clear()
        steps = (conv.Step * len(self.steps))(*self.steps)
        shape = self.shapes[len(self.ops) - 1]
        shape = shape[:2] if self.ops[-1].flat else shape
        return Plan(steps, shape, self.arena.size, self.threads, self.layers)

    def _append(self, at: int) -> None:
        op = self.ops[at]
        step = conv.step(op.kind, self.layers[at], self.shapes[op.x], self.shapes[at][2:])
        final = at == len(self.ops) - 1
        # and only they write them
        direct = final and (self.last or op.kind in (conv.CONVOLUTION, conv.MEAN))
        if self.chains.get(at, 1) > 1 and op.kind == conv.CONVOLUTION:
            self.places[at] = conv.NOWHERE  # threads keep a few lines of it
        else:
            self.places[at] = conv.OUTPUT if direct else self.arena.take(self._bytes(at))
        step.together = self.chains.get(at, 1)
        step.x, step.y = self.places[op.x], self.places[at]
        step.x_last = self._is_last(step.x, self.shapes[op.x])
        step.y_last = self._is_last(step.y, self.shapes[at])
        step.end(op.ending)
        if op.gate is not None:
            step.gate = self.places[op.gate]
        if op.other is not None:
            step.other = self.places[op.other]
            step.last_low, step.last_high = op.last_ending[:2]
        self._set_ranges(at, step)
        self.steps.append(step)
        if final and not direct:
            self._turn(conv.TO_PLANES, at, step.y, conv.OUTPUT)

    def _is_last(self, place: int, shape: Sequence[int]) -> bool:
        """Are the channels the last dimension? Images of one pixel have both orders."""
        last = {conv.INPUT: self.x_last, conv.OUTPUT: self.last}.get(place, True)
        return last or math.prod(shape[2:]) == 1

    def _set_ranges(self, at: int, step: conv.Step) -> None:
        """A convolution notes the ranges of its samples where a later one asks for them."""
        op = self.ops[at]
        if op.needs_range():
            step.x_range = self.ranges.get(op.x, conv.NOWHERE)
        asked = any(other.x == at and other.needs_range() for other in self.ops)
        if asked and op.kind == conv.CONVOLUTION:
            each = conv.functions().range_bytes
            step.y_range = self.arena.take(self.threads * self.shapes[at][0] * each)
            self.ranges[at] = step.y_range

    def _turn(self, kind: int, value: int, x: int, y: int) -> None:
        """Copy a value into the other order of channels."""
        shape = self.shapes[value]
        ones, zeros = (1,) * len(shape[2:]), (0,) * len(shape[2:])
        layer = Geometry(ones, ones, zeros, zeros).layer(ones, shape[1], shape[1])
        self.layers.append(layer)
        step = conv.step(kind, layer, shape, shape[2:])
        step.x, step.y = x, y
        self.steps.append(step)

    def _free(self, at: int) -> None:
        """Give back the places of values that no later operation reads."""
        later = set(itertools.chain.from_iterable(op.reads for op in self.ops[at + 1 :]))
        for value in dict.fromkeys(self.ops[at].reads):
            if value not in later and self.places[value] >= 0:
                self.arena.give(self.places[value], self._bytes(value))
