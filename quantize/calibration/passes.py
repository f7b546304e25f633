"""A forward pass that takes the outputs of modules that ran before, where these can't have changed.

A module's output is kept only where that can't be noticed: it draws no random numbers, changes
neither its inputs nor any module's state, returns tensors of its own or inputs as they are, and
hooks of others don't run inside. Past a number of bytes outputs go to files (`stored`).
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantize.calibration.inputs import on_tensors
from quantize.calibration.patches import snapshot, storage_of
from quantize.calibration.stored import Store

PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, slice)
# what may be asked of a tensor whose values are gone
_Tensor: Any = Tensor  # at run time its attributes are descriptors
_METADATA = {
    _Tensor.shape.__get__,
    _Tensor.ndim.__get__,
    _Tensor.dtype.__get__,
    _Tensor.device.__get__,
    _Tensor.layout.__get__,
    _Tensor.requires_grad.__get__,
    Tensor.size,
    Tensor.dim,
    Tensor.is_floating_point,
}


@dataclass(eq=False)
class Ran:
    """One call of a module in a pass over a batch: its output, once that is final, or else the
    calls inside of it.
    """

    inside: dict[tuple[str, int], Ran] = field(default_factory=dict)
    kept: bool = False
    output: Any = None

    def keep(self, output: Any) -> None:
        self.inside.clear()
        self.kept = True
        self.output = output


class Missing(BaseException):
    """A pass reads values that were thought to be of no more use."""


class Gone(Tensor):
    """Stands for a tensor whose values nobody reads; raises if somebody does."""

    @classmethod
    def of(cls, tensor: Tensor) -> Tensor:
        nothing = torch.full((), torch.nan).to(tensor.dtype).to(tensor.device)
        return nothing.expand(tensor.shape).as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function in _METADATA:
            with torch._C.DisableTorchFunction():
                return function(*args, **(kwargs or {}))
        raise Missing


class Given(Gone):
    """Stands for an input, by its place among these, in what a module gives."""

    place: int

    @classmethod
    def at(cls, place: int) -> Tensor:
        found: Any = cls.of(torch.empty(()))
        found.place = place
        return found


def _dropped(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, Given) else Gone.of(tensor)


class Pass(TorchFunctionMode):
    """One forward pass over a batch: takes what is kept, and keeps what is final.

    Args:
        root: what earlier passes over the batch have kept.
        store: where outputs go.
        shown: layers for whose sake it runs; what nobody needs up to the first of them is dropped.
        changing: layers that may still change; what ends after the first of them began isn't final.
        impure: modules that are never kept.
        draws: may modules draw random numbers?
    """

    def __init__(
        self,
        root: Ran,
        store: Store,
        shown: Collection[str],
        changing: Collection[str],
        impure: Collection[str],
        *,
        draws: bool,
    ) -> None:
        super().__init__()
        self.store = store
        self.draws = draws
        self.shown = shown
        self.changing = changing
        self.impure = impure
        self.final = True
        self.arrived = False
        self.frames: list[tuple[Ran, Counter]] = [(root, Counter())]
        self.lent: dict[int, tuple[Ran, weakref.ref]] = {}
        self.read: set[Ran] = set()

    def begin(self, name: str) -> None:
        """A layer is about to run."""
        if name in self.changing:
            self.final = False
        if name in self.shown and not self.arrived:
            self.arrived = True
            self._forget()

    def forward(self, name: str, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """A module's output: the kept one, or what its `forward` gives."""
        parent, counts = self.frames[-1]
        ran = parent.inside.setdefault((name, counts[name]), Ran())
        counts[name] += 1
        if ran.kept:
            return self._lend(ran, list(leaves((args, kwargs))))
        inputs = None
        if self.final and name not in self.impure:
            inputs = _Inputs(args, kwargs, draws=self.draws)
        self.frames.append((ran, Counter()))
        try:
            output = forward(*args, **kwargs)
        finally:
            self.frames.pop()
        if self.final and inputs is not None and inputs.unchanged() and inputs.apart(output):
            with torch._C.DisableTorchFunction():
                ran.keep(on_tensors(output, functools.partial(self._copy, inputs.places)))
        return output

    def _copy(self, places: dict[int, int], tensor: Tensor) -> Tensor:
        place = places.get(id(tensor))
        return self.store.copy(tensor) if place is None else Given.at(place)

    def _lend(self, ran: Ran, inputs: list[Any]) -> Any:
        def lend(tensor: Tensor) -> Tensor:
            if isinstance(tensor, Given):
                return inputs[tensor.place]  # type: ignore[no-any-return]
            if isinstance(tensor, Gone):
                return tensor
            copy = snapshot(tensor)  # the model may go on to write into it
            self.lent[id(copy)] = (ran, weakref.ref(copy))
            return copy

        with torch._C.DisableTorchFunction():
            return on_tensors(ran.output, lend)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.lent and function not in _METADATA:
            for value in leaves((args, kwargs)):
                if id(value) in self.lent:
                    self.read.add(self.lent[id(value)][0])
        return function(*args, **kwargs)

    def _forget(self) -> None:
        """Drop the outputs that no code has read so far and that no frame holds any more: later
        passes go the same way.
        """
        held = {ran for ran, tensor in self.lent.values() if tensor() is not None}
        for ran in {ran for ran, _ in self.lent.values()} - held - self.read:
            with torch._C.DisableTorchFunction():
                ran.output = on_tensors(ran.output, _dropped)


class _Inputs:
    """What a module was called with, and whether its call may be replaced by its output."""

    def __init__(self, args: tuple, kwargs: dict, *, draws: bool) -> None:
        self.given = (args, kwargs)
        self.random = torch.get_rng_state() if draws else None
        self.leaves = list(leaves(self.given))
        self.places = {id(value): at for at, value in enumerate(self.leaves)}
        with torch._C.DisableTorchFunction():
            self.versions = [_version(value) for value in self.leaves]

    def unchanged(self) -> bool:
        """Are all inputs plain, and as they were, and were no random numbers drawn?"""
        found = list(leaves(self.given))
        with torch._C.DisableTorchFunction():
            same = [a is b for a, b in zip(found, self.leaves, strict=False)]
            if len(found) != len(self.leaves) or not all(same):
                return False
            if None in self.versions or self.versions != [_version(value) for value in found]:
                return False
            return self.random is None or torch.equal(self.random, torch.get_rng_state())

    def apart(self, output: Any) -> bool:
        """Is the output made of inputs and of plain tensors that share no memory with them?"""
        with torch._C.DisableTorchFunction():
            inputs = [value for value in self.leaves if isinstance(value, Tensor)]
            taken = {storage_of(tensor) for tensor in inputs if tensor.layout == torch.strided}
            for value in leaves(output):
                if isinstance(value, PLAIN) or id(value) in self.places:
                    continue
                if type(value) not in (Tensor, nn.Parameter) or value.is_nested:
                    return False
                if value.layout != torch.strided or storage_of(value) in taken:
                    return False
            return True


def _version(value: Any) -> int | None:
    """How often a tensor was written to; None for what can't tell."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    return 0 if isinstance(value, PLAIN) else None


def leaves(value: Any) -> Iterator[Any]:
    """What is in tuples, lists and dicts, nested."""
    if type(value) is dict:
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from leaves(part)
    else:
        yield value


@contextmanager
def routed_through(
    current: list[Pass], model: nn.Module, layers: Collection[str]
) -> Iterator[None]:
    """Inside, every module of `model` asks the pass in `current[0]` for its output."""

    def route(name: str, forward: Callable) -> Callable:
        def routed(*args: Any, **kwargs: Any) -> Any:
            return current[0].forward(name, forward, args, kwargs)

        routed.__wrapped__ = forward  # type: ignore[attr-defined]  # so that it has its signature
        return routed

    changed: list[tuple[dict, Any]] = []  # of each module its attributes, and its own forward
    handles = []
    try:
        for name, module in list(model.named_modules()):
            if name and not isinstance(module, torch.jit.ScriptModule):
                changed.append((module.__dict__, module.__dict__.get("forward")))
                module.__dict__["forward"] = route(name, module.forward)
        for name in layers:
            begin = functools.partial(lambda name, *_: current[0].begin(name), name)
            handles.append(model.get_submodule(name).register_forward_pre_hook(begin))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for attributes, own in changed:
            del attributes["forward"]
            if own is not None:
                attributes["forward"] = own


def impure_modules(model: nn.Module, stateful: Collection[str]) -> set[str]:
    """Modules that change state, or inside of which one does or a hook of somebody else runs."""
    modules = dict(model.named_modules())
    changing = {id(modules[name]) for name in stateful}
    hooked = {id(m) for m in modules.values() if m._forward_hooks or m._forward_pre_hooks}
    found = set()
    for name, module in modules.items():
        parts = {id(part) for part in module.modules()}
        if parts & changing or (parts - {id(module)}) & hooked:
            found.add(name)
    return found
