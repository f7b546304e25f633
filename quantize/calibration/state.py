"""Run a model and leave no trace: what a forward pass may change is as before afterwards."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantize import surgery

# Structure, hooks and records of a module: techniques may change them inside.
_NOT_STATE = (frozenset(nn.Module().__dict__) - {"training"}) | {"_structure", "_notes"}
_KEPT_WHOLE = (type, nn.Module, torch.dtype, torch.device)
_NUMBERS = (bool, int, float, str)
# Models of transformers add theirs at the first call, and an attribute says that they have.
_FORWARD_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
_SEQUENCES = (list, tuple, set, frozenset, deque)


@contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Inside, run the models as often as you like; afterwards their state and the random state are
    as before.

    State is: buffers (assigned anew or changed in place), plain attributes of every module
    (tensors, numbers, containers and simple objects, to any depth), training flags, weights that a
    forward renormalizes (`max_norm`) or writes to (`surgery.written_layers`), forward hooks that
    were added, and the generators of torch, numpy and Python. Replaced modules and parameters that
    somebody else writes stay as written.
    """
    saved: list[_State] = []
    memo: dict[int, _Saved] = {}
    for model in models:
        written = surgery.written_layers(model)
        saved.extend(_State(module, memo, module in written) for module in model.modules())
    generators = _Generators()
    try:
        yield
    finally:
        for state in saved:
            state.restore()
        generators.restore()


def changed(model: nn.Module, run: Callable[[], Any]) -> set[str]:
    """Names of the modules whose state `run` changes; all is as before afterwards.

    Random numbers of torch's own generator count as the root's state, those of numpy and Python as
    everyone's.
    """
    memo: dict[int, _Saved] = {}
    written = surgery.written_layers(model)
    named = model.named_modules()
    saved = {name: _State(module, memo, module in written) for name, module in named}
    generators = _Generators()
    try:
        run()
        names = {name for name, state in saved.items() if state.changed()}
        if generators.torch_moved():
            names.add("")
        if generators.others_moved():
            names.update(saved)
    finally:
        for state in saved.values():
            state.restore()
        generators.restore()
    return names


class _State:
    """What a forward pass of one module may change.

    memo: by id, what was saved of other modules and need not be saved again. written: does a
        forward around it write to its weight?
    """

    def __init__(self, module: nn.Module, memo: dict[int, _Saved], written: bool) -> None:
        self.module = module
        constant = getattr(
            type(module), "constant_buffers", False
        )  # a compressed layer's, too large to copy
        buffers = {} if constant else module._buffers
        self.constant = frozenset(module._buffers) if constant else frozenset()
        self.buffers = {name: _Saved(buffer, {}) for name, buffer in buffers.items()}
        plain = {name: value for name, value in module.__dict__.items() if name not in _NOT_STATE}
        self.attributes = {name: _saved(value, memo) for name, value in plain.items()}
        self.hooks = {kind: set(getattr(module, kind)) for kind in _FORWARD_HOOKS}
        self.weights = [
            _Saved(p, {})
            for p in module._parameters.values()
            if p is not None and (written or _renormalizes(module))
        ]

    def changed(self) -> bool:
        buffers = {n: b for n, b in self.module._buffers.items() if n not in self.constant}
        plain = {n: v for n, v in self.module.__dict__.items() if n not in _NOT_STATE}
        if _differ(self.buffers, buffers) or _differ(self.attributes, plain):
            return True
        return any(saved.changed() for saved in self.weights)

    def restore(self) -> None:
        for name in [
            n for n in self.module._buffers if n not in self.buffers and n not in self.constant
        ]:
            del self.module._buffers[name]
        for name, saved in self.buffers.items():
            self.module._buffers[name] = saved.restored()
        now = self.module.__dict__
        for name in [n for n in now if n not in self.attributes and n not in _NOT_STATE]:
            del now[name]
        for name, saved in self.attributes.items():
            now[name] = saved.restored()
        for kind, before in self.hooks.items():
            hooks = getattr(self.module, kind)
            for key in hooks.keys() - before:
                del hooks[key]
        for saved in self.weights:
            saved.restored()


def _renormalizes(module: nn.Module) -> bool:
    return vars(module).get("max_norm") is not None  # nn.Module's getattr is slow


class _Saved:
    """A value and what is in it; `restored()` gives the same object back with the same content."""

    def __init__(self, value: Any, memo: dict[int, _Saved]) -> None:
        self.value = value
        self.parts: Any = None
        memo[id(value)] = self
        self.done = False
        self.differs: bool | None = None  # known once it was asked for
        if value is None or isinstance(value, _NUMBERS):
            return
        if isinstance(value, Tensor):
            self.parts = _of_tensor(value)
        elif isinstance(value, dict):
            self.parts = {key: _saved(part, memo) for key, part in value.items()}
        elif isinstance(value, _SEQUENCES):
            self.parts = [_saved(part, memo) for part in value]
        elif isinstance(value, torch.Generator):
            self.parts = value.get_state()
        elif (
            hasattr(value, "__dict__")
            and not isinstance(value, _KEPT_WHOLE)
            and not callable(value)
        ):
            self.parts = {key: _saved(part, memo) for key, part in vars(value).items()}

    def changed(self) -> bool:
        """Has the content of the value changed?"""
        if self.differs is None:
            self.differs = False  # until then: what holds itself is asked again
            self.differs = self.parts is not None and self._compare()
        return self.differs

    def _compare(self) -> bool:
        value, parts = self.value, self.parts
        if isinstance(value, Tensor):
            return value.shape != parts[0].shape or not torch.equal(value, parts[0])
        if isinstance(value, torch.Generator):
            return not torch.equal(value.get_state(), parts)
        if isinstance(value, _SEQUENCES):
            return _differ(dict(enumerate(parts)), dict(enumerate(value)))
        return _differ(parts, value if isinstance(value, dict) else vars(value))

    def restored(self) -> Any:
        if self.done or self.parts is None:
            return self.value
        self.done = True
        value, parts = self.value, self.parts
        if isinstance(value, Tensor):
            _restore_tensor(value, *parts)
        elif isinstance(value, dict):
            _refill(value, parts)
        elif isinstance(value, torch.Generator):
            value.set_state(parts)
        elif isinstance(value, _SEQUENCES):
            before = [part.restored() for part in parts]
            if not isinstance(value, (tuple, frozenset)):
                value.clear()
                (value.update if isinstance(value, set) else value.extend)(before)
        else:
            _refill(vars(value), parts)
        return value


def _differ(saved: dict[Any, _Saved], now: dict[Any, Any]) -> bool:
    """Have names come or gone, or values, or what is in them?"""
    if saved.keys() != now.keys():
        return True
    for name, before in saved.items():
        value = now[name]
        equal = isinstance(value, _NUMBERS) and type(value) is type(before.value)
        if value is not before.value and not (equal and value == before.value):
            return True
    return any(before.changed() for before in saved.values())


def _saved(value: Any, memo: dict[int, _Saved]) -> _Saved:
    found = memo.get(id(value))
    return _Saved(value, memo) if found is None else found


def _refill(values: dict[Any, Any], parts: dict[Any, _Saved]) -> None:
    before = {key: part.restored() for key, part in parts.items()}
    if list(values) != list(before) or any(values[key] is not before[key] for key in before):
        values.clear()
        values.update(before)


def _of_tensor(tensor: Tensor) -> tuple[Tensor, bool] | None:
    if tensor.is_meta or tensor.layout != torch.strided or nn.parameter.is_lazy(tensor):
        return None
    return tensor.detach().clone(), tensor.is_leaf


@torch.no_grad()
def _restore_tensor(tensor: Tensor, content: Tensor, leaf: bool) -> None:
    """Give `tensor` its content back where it changed; its version doesn't tell: BatchNorm's
    kernels don't count theirs up.
    """
    if leaf and not tensor.is_leaf and not tensor._is_view():
        tensor.detach_()  # something with a gradient was written into it
    if tensor.shape != content.shape:
        tensor.data = content
    elif torch.equal(tensor, content):
        return
    elif tensor.is_inference():
        with torch.inference_mode():
            tensor.copy_(content)
    else:
        tensor.copy_(content)


class _Generators:
    """The random state of torch on the CPU, numpy and Python."""

    def __init__(self) -> None:
        self.torch = torch.get_rng_state()
        self.python = random.getstate()
        numpy = sys.modules.get("numpy")
        self.numpy = None if numpy is None else numpy.random.get_state()

    def torch_moved(self) -> bool:
        return not torch.equal(torch.get_rng_state(), self.torch)

    def others_moved(self) -> bool:
        if random.getstate() != self.python:
            return True
        if self.numpy is None:
            return False
        # name, keys, position, and a normal number in store
        now = sys.modules["numpy"].random.get_state()
        return now[2:] != self.numpy[2:] or any(now[1] != self.numpy[1])

    def restore(self) -> None:
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
