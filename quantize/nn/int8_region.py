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
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _pop_mode_temporarily, handle_torch_function

from quantize import surgery
from quantize.native import int8 as native_int8
from quantize.nn import int8_images, is_traced
from quantize.nn import int8_kernels as kernels
from quantize.nn.int8_chain import Program
from quantize.nn.int8_program import trace
from quantize.nn.int8_tracer import AsksForSize
from quantize.nn.protocol import standing_for
from quantize.nn.replay import plainly, replayed
from quantize.nn.tape import is_replacing
from quantize.nn.watched import State, state_of

_MOST_SHAPES = 16  # of inputs whose programs are kept
_MOST_CHANGES = 16  # of a region, before it is left to its forward


class _Programs:
    """The programs of a region by the shape of inputs, or one for all under None. They hold as long
    as all that its forward depends on stays as it was; `is_open`: can that be seen?
    """

    def __init__(self) -> None:
        self.known: dict[torch.Size | None, Program | None] = {}
        self.state: State | None = None
        self.is_open, self.asks_for_size, self.changes = True, False, 0

    def program(self, module: nn.Module, shape: torch.Size) -> Program | None:
        """For inputs of a shape, made when it is first asked for; None where there is none."""
        key = shape if self.asks_for_size else None
        if not self.is_open or (self.state is not None and self.state.is_watched()):
            return None
        if self.state is None or not self.state.holds():
            self._begin(module)
        if self.state is None or not self.state.is_plain:
            return None
        if key in self.known:
            return self.known[key]
        if len(self.known) > _MOST_SHAPES:
            self.known.clear()
        try:
            self.known[key] = _made(module, key)
        except AsksForSize:
            self.asks_for_size = True
            return self.program(module, shape)
        self.is_open = self.state.holds()  # or the forward itself changes something
        return self.known[key] if self.is_open else None

    def has_none(self) -> bool:
        """Is there none for any shape?"""
        return not self.is_open or (None in self.known and self.known[None] is None)

    def _begin(self, module: nn.Module) -> None:
        self.known.clear()
        self.state = state_of(module)
        self.changes += 1
        self.is_open = self.state is not None and self.changes <= _MOST_CHANGES


_programs: weakref.WeakKeyDictionary[nn.Module, _Programs] = weakref.WeakKeyDictionary()


def program_of(module: nn.Module, shape: torch.Size) -> Program | None:
    """The program of a region for inputs of a shape; None where it has none."""
    known = _programs.get(module)
    if known is None:
        known = _programs[module] = _Programs()
    return known.program(module, shape)


@torch.inference_mode(False)
@torch.no_grad()
def _made(module: nn.Module, shape: torch.Size | None) -> Program | None:
    ops = trace(module, shape)
    if ops is None:
        return None
    found = Program(ops, shape, functools.partial(_own_forward, weakref.ref(module)))
    if not found.fits() or not int8_images.is_exact():
        return None
    return found if found.is_exact() else None


def _own_forward(region: weakref.ref[Any], x: Tensor) -> Tensor:
    """Of a region that still lives."""
    module = region()
    return plainly(functools.partial(type(module).own_forward, module, x))  # type: ignore[no-any-return]


def _run(module: nn.Module, x: Tensor) -> Tensor | None:
    """The result of a region's program, or None where its forward has to run."""
    if not (torch._C._len_torch_function_stack() and is_replacing()):
        program = _fitting(module, x)
        return None if program is None else program.run(x)
    with _pop_mode_temporarily():
        program = _fitting(module, x)
        if program is None or not program.has_plan(x):
            return None
    # a call of its own in what is recorded
    return handle_torch_function(program, (x,), x)  # type: ignore[no-any-return]


def _fitting(module: nn.Module, x: Tensor) -> Program | None:
    """The program of a region for x."""
    known = _programs.get(module)
    if known is not None and known.has_none():
        return None
    plain = type(x) is Tensor and x.dtype is torch.float32 and native_int8.takes(x) and x.numel()
    if not plain or (x.requires_grad and torch.is_grad_enabled()):
        return None
    if module.training or not kernels.native_allowed():
        return None
    return program_of(module, x.shape)


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

    content = {"forward": forward, "own_forward": own_forward}
    return standing_for(base, (Region, base), content, region_class)


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
