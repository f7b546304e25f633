"""Modules whose int8 convolutions run in one native call, and those of which the calls of torch are
made without the Python around them.

A region is a module of the model with its own class, made into a subclass that tries a program
first (`int8_program`), then a tape (`replay`). The module's own forward runs wherever neither can:
in graphs, under hooks, for inputs of other kinds; programs need native code too. All give the same
bits; a program is compared with the forward on two inputs before it is used. Most programs are made
for all shapes of inputs, those of a forward that asks for sizes for one.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from quantize import surgery
from quantize.native import conv
from quantize.native import int8 as native_int8
from quantize.nn import int8_images, is_traced
from quantize.nn import int8_kernels as kernels
from quantize.nn.int8_plan import Plan, planned
from quantize.nn.int8_program import SOURCE, Op, trace
from quantize.nn.int8_tracer import AsksForSize, Unfit
from quantize.nn.replay import replayed

_MOST_SHAPES = 16  # of inputs whose plans are kept
_SIDES = (12, 48, 96)  # of inputs that a program is tried on, the smallest that fits


class Program:
    """What a region runs, as long as its modules stay what they are.

    Args:
        module: the region.
        ops: of its forward.
        shape: of the inputs that they are for; None: of any.
    """

    def __init__(self, module: nn.Module, ops: list[Op], shape: torch.Size | None) -> None:
        self.ops, self.shape = ops, shape
        self.layers = [op.module if op.kind != conv.LARGEST else None for op in ops]
        self.links: list[tuple[dict[str, nn.Module | None], str, nn.Module | None]] = []
        for parent in module.modules():
            children = parent._modules
            self.links += [(children, name, child) for name, child in children.items()]
        self.tensors: list[Tensor | None] = []  # of the layers, when their packs were made,
        self.state: list[tuple[int, ...]] | None = None  # and what tells whether they changed
        self.packs: list[conv.Packed | None] = []
        self.vectors: list[tuple[Tensor | None, ...] | None] = []  # that these hold
        self.plans: dict[tuple[torch.Size, bool, int], Plan | None] = {}

    def is_current(self) -> bool:
        """Are the modules inside those that it was made of?"""
        return all(children.get(name) is child for children, name, child in self.links)

    def is_watched(self) -> bool:
        """Does somebody see the calls of the modules inside, or are some in training mode?"""
        for _, _, child in self.links:
            if child is None:
                continue
            if child._forward_hooks or child._forward_pre_hooks or child.training:
                return True
            if "forward" in child.__dict__:
                return True
        return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)

    def run(self, x: Tensor) -> Tensor | None:
        """The result, or None where there is no plan for inputs of this shape."""
        self._pack()
        key = x.shape, conv.channels_last(x), torch.get_num_threads()
        if key not in self.plans:
            if len(self.plans) >= _MOST_SHAPES:
                self.plans.clear()
            self.plans[key] = self._plan(x)
        plan = self.plans[key]
        return None if plan is None else plan.run(x)

    def _pack(self) -> None:
        """Bring what the kernel reads up to date with the layers."""
        tensors: list[Tensor | None] = []
        for layer in self.layers:
            if layer is not None:
                tensors += layer._buffers.values()
        state = _state(tensors)
        vectors = [None if own is None else own.vectors for own in self.packs]
        # another layer may hold the same weight, and have been called with another bias
        kept = all(map(operator.is_, vectors, self.vectors))
        if state is not None and state == self.state and kept:
            return
        self.tensors, self.state = tensors, state
        self.packs = [None if op.kind == conv.LARGEST else _packed(op) for op in self.ops]
        self.vectors = [None if own is None else own.vectors for own in self.packs]
        self.plans.clear()

    def _plan(self, x: Tensor) -> Plan | None:
        layers = [None if own is None else own.layer for own in self.packs]
        try:
            return planned(self.ops, layers, x)
        except (Unfit, ValueError, MemoryError):  # the module's forward says what is wrong
            return None

    def fits(self) -> bool:
        """May its layers be read by native code, each with a weight of its own?"""
        weights = [layer.packed for layer in self.layers if layer is not None]
        alone = len({id(weight) for weight in weights}) == len(weights)
        on_cpu = all(weight.device.type == "cpu" for weight in weights)
        short = all(w[0].numel() <= native_int8.MOST_INPUTS for w in weights)
        return alone and on_cpu and short and not any(w.is_inference() for w in weights)

    def is_exact(self, forward: Any) -> bool:
        """Does it give the bits of the module's forward, in both orders of channels?"""
        for shape in self._shapes():
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            orders = [x.clone()]
            if x.dim() > 3:
                orders.append(x.clone(memory_format=conv.LAST[x.dim()]))
            try:
                expected = [forward(one) for one in orders]
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
        first = next(op.module for op in self.ops if op.x == SOURCE and op.kind != conv.LARGEST)
        for side in _SIDES:
            yield 2, first.in_channels, *[side] * len(first.kernel_size)


def _state(tensors: list[Tensor | None]) -> list[tuple[int, ...]] | None:
    """What tells whether one of them was changed or replaced, as long as they live; None where
    changes can't be seen.
    """
    found: list[tuple[int, ...]] = []
    for tensor in tensors:
        if tensor is None:
            found.append(())
        elif tensor.is_inference():
            return None
        else:
            found.append((id(tensor), tensor._version, tensor.data_ptr()))
    return found


def _packed(op: Op) -> conv.Packed:
    layer = op.module
    found = conv.packed(layer.packed, op.geometry)
    found.with_vectors(layer.scale, layer.bias)
    return found


def _same(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.stride() == b.stride() and torch.equal(a, b)


_Programs = dict[torch.Size | None, "Program | None"]  # by the shape of inputs; None: for all
_programs: weakref.WeakKeyDictionary[nn.Module, _Programs] = weakref.WeakKeyDictionary()
_asking: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # those that have one for each shape


def program_of(module: nn.Module, shape: torch.Size) -> Program | None:
    """The program of a region for inputs of a shape, made when it is first asked for; None where it
    has none.
    """
    known = _programs.setdefault(module, {})
    key = shape if module in _asking else None
    found = known.get(key)
    if key in known and (found is None or found.is_current()):
        return found
    if len(known) > _MOST_SHAPES:
        known.clear()
    try:
        found = known[key] = _made(module, key)
    except AsksForSize:
        _asking.add(module)
        return program_of(module, shape)
    return found


@torch.inference_mode(False)
@torch.no_grad()
def _made(module: nn.Module, shape: torch.Size | None) -> Program | None:
    ops = trace(module, shape)
    if ops is None:
        return None
    found = Program(module, ops, shape)
    if not found.fits() or found.is_watched() or not int8_images.is_exact():
        return None
    forward = functools.partial(type(module).own_forward, module)  # type: ignore[attr-defined]
    return found if found.is_exact(forward) else None


def _run(module: nn.Module, x: Tensor) -> Tensor | None:
    """The result of a region's program, or None where its forward has to run."""
    plain = type(x) is Tensor and x.dtype is torch.float32 and native_int8.takes(x) and x.numel()
    if not plain or (x.requires_grad and torch.is_grad_enabled()):
        return None
    if module.training or not kernels.native_allowed():
        return None
    program = program_of(module, x.shape)
    if program is None or program.is_watched():
        return None
    return program.run(x)


class Region:
    """What all regions are, besides what their classes say. own_class, own_forward: that class, and
    its forward.
    """


@functools.cache
def region_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module's class that tries a program first."""
    own_forward: Any = base.forward

    @functools.wraps(own_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_traced():
            return own_forward(self, *args, **kwargs)
        if len(args) == 1 and not kwargs:
            found = _run(self, args[0])
            if found is not None:
                return found
        return replayed(self, own_forward, args, kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        return _empty, (base,), self.__getstate__()

    names = {"forward": forward, "own_forward": own_forward, "__reduce_ex__": reduce}
    names |= {"own_class": base, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (Region, base), names)


def _empty(base: type[nn.Module]) -> nn.Module:
    """A region without its state, for a copy or a pickle."""
    made = region_class(base)
    return made.__new__(made)


@surgery.builder
def int8_region(module: nn.Module) -> nn.Module:
    """Make a module a region, in place; one that can't be one stays as it is."""
    if may_be_region(module):
        module.__class__ = region_class(type(module))
    return module


def may_be_region(module: nn.Module) -> bool:
    """Is its class one that a subclass can stand in for?"""
    kind = type(module)
    plain = kind.__reduce_ex__ is object.__reduce_ex__ and "forward" not in vars(module)
    return plain and not isinstance(module, Region)
