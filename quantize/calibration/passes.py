"""A forward pass that takes the outputs of modules that ran before, where these can't have changed.

A module's output is kept only where that can't be noticed: it draws no random numbers, changes
neither its inputs nor any module's state, returns tensors of its own, and hooks of others don't run
inside. Past a number of bytes outputs go to files without names, which end with their tensors.
"""

from __future__ import annotations

import functools
import mmap
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantize.calibration.inputs import on_tensors
from quantize.calibration.patches import snapshot, storage_of

WORTH_A_FILE = 1 << 16  # bytes of what a graph saves
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


class Store:
    """Copies of tensors, in memory up to a limit, then in files that have no name any more.

    Args:
        memory: bytes that stay in memory.
        folder: of the files; None: the system's for temporary ones.
    """

    def __init__(self, memory: int, folder: Path | None = None) -> None:
        self.memory = memory
        self.folder = folder
        self.used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        if self.used + size > self.memory and tensor.device.type == "cpu" and size:
            return _in_a_file(tensor, self.folder)
        kept = snapshot(tensor)
        self.used += size
        weakref.finalize(kept, self._free, size)
        return kept

    def _free(self, size: int) -> None:
        self.used -= size


def _in_a_file(tensor: Tensor, folder: Path | None) -> Tensor:
    with tempfile.NamedTemporaryFile(prefix="quantize-", dir=folder) as file:
        file.truncate(tensor.nbytes)
        mapped = mmap.mmap(file.fileno(), tensor.nbytes)  # holds the file until it goes itself
    values = torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape)
    values.copy_(tensor)
    if hasattr(mmap, "MADV_DONTNEED"):  # the pages stay in the file, no longer in this process
        mapped.madvise(mmap.MADV_DONTNEED)
    return values


@contextmanager
def saved_in_files(model: nn.Module, memory: int) -> Iterator[None]:
    """Inside, of what the graph of one pass saves for its way back, `memory` bytes stay in memory;
    the rest goes to files.
    """
    store = Store(0)
    weights = {storage_of(parameter) for parameter in model.parameters()}
    kept = 0

    def pack(tensor: Tensor) -> tuple[Tensor, int]:
        nonlocal kept
        plain = tensor.detach()
        movable = type(plain) is Tensor and plain.layout == torch.strided
        if movable and plain.nbytes >= WORTH_A_FILE and storage_of(plain) not in weights:
            kept += plain.nbytes
            if kept > memory:
                plain = store.copy(plain)
        return plain, plain._version

    def unpack(saved: tuple[Tensor, int]) -> Tensor:
        tensor, version = saved
        if tensor._version != version:  # as torch does for what it saves itself
            raise RuntimeError("a tensor that a gradient needs was modified in place")
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


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
            return self._lend(ran)
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
                ran.keep(on_tensors(output, self.store.copy))
        return output

    def _lend(self, ran: Ran) -> Any:
        def lend(tensor: Tensor) -> Tensor:
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
                ran.output = on_tensors(ran.output, Gone.of)


class _Inputs:
    """What a module was called with, and whether its call may be replaced by its output."""

    def __init__(self, args: tuple, kwargs: dict, *, draws: bool) -> None:
        self.given = (args, kwargs)
        self.random = torch.get_rng_state() if draws else None
        self.leaves = list(leaves(self.given))
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
        """Is the output made of plain tensors that share no memory with the inputs?"""
        with torch._C.DisableTorchFunction():
            inputs = [value for value in self.leaves if isinstance(value, Tensor)]
            taken = {storage_of(tensor) for tensor in inputs if tensor.layout == torch.strided}
            for value in leaves(output):
                if isinstance(value, PLAIN):
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
