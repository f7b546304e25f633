"""Run a model and leave no trace: what a forward pass may change is as before afterwards."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Structure, hooks and records of a module: techniques may change them inside.
_NOT_STATE = (frozenset(nn.Module().__dict__) - {"training"}) | {"_structure", "_notes"}
_KEPT_WHOLE = (type, nn.Module, torch.dtype, torch.device)
_SEQUENCES = (list, tuple, set, frozenset, deque)


@contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Inside, run the models as often as you like; afterwards their state and the random state are
    as before.

    State is: buffers (assigned anew or changed in place), plain attributes of every module
    (tensors, numbers, containers and simple objects, to any depth), training flags, weights that a
    forward renormalizes (`max_norm`), and the generators of torch, numpy and Python. Replaced
    modules and parameters that somebody writes on purpose stay as written.
    """
    saved = [_State(module) for model in models for module in model.modules()]
    generators = _Generators()
    try:
        yield
    finally:
        for state in saved:
            state.restore()
        generators.restore()


class _State:
    """What a forward pass of one module may change."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        constant = getattr(
            type(module), "constant_buffers", False
        )  # a compressed layer's, too large to copy
        buffers = {} if constant else module._buffers
        self.constant = frozenset(module._buffers) if constant else frozenset()
        self.buffers = {name: _Saved(buffer, {}) for name, buffer in buffers.items()}
        memo: dict[int, _Saved] = {}
        plain = {name: value for name, value in module.__dict__.items() if name not in _NOT_STATE}
        self.attributes = {name: _Saved(value, memo) for name, value in plain.items()}
        self.weights = [
            _Saved(p, {})
            for p in module._parameters.values()
            if p is not None and _renormalizes(module)
        ]

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
        for saved in self.weights:
            saved.restored()


def _renormalizes(module: nn.Module) -> bool:
    return getattr(module, "max_norm", None) is not None


class _Saved:
    """A value and what is in it; `restored()` gives the same object back with the same content."""

    def __init__(self, value: Any, memo: dict[int, _Saved]) -> None:
        self.value = value
        self.parts: Any = None
        memo[id(value)] = self
        if isinstance(value, torch.Tensor):
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
        self.done = False

    def restored(self) -> Any:
        if self.done or self.parts is None:
            return self.value
        self.done = True
        value, parts = self.value, self.parts
        if isinstance(value, torch.Tensor):
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


def _saved(value: Any, memo: dict[int, _Saved]) -> _Saved:
    found = memo.get(id(value))
    return _Saved(value, memo) if found is None else found


def _refill(values: dict[Any, Any], parts: dict[Any, _Saved]) -> None:
    before = {key: part.restored() for key, part in parts.items()}
    if list(values) != list(before) or any(values[key] is not before[key] for key in before):
        values.clear()
        values.update(before)


def _of_tensor(tensor: torch.Tensor) -> tuple[torch.Tensor, bool] | None:
    if tensor.is_meta or tensor.layout != torch.strided or nn.parameter.is_lazy(tensor):
        return None
    return tensor.detach().clone(), tensor.is_leaf


@torch.no_grad()
def _restore_tensor(tensor: torch.Tensor, content: torch.Tensor, leaf: bool) -> None:
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

    def restore(self) -> None:
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
