"""Integers that a layer doesn't hold beside their panels.

A layer that alone holds its integers gives them up once they are packed, so that they lie in memory
once. Whoever asks for them, by an attribute, a list of buffers, a state dict, a copy or a file,
finds them where they were: they are computed from the panels, bit for bit, and held again. A
tensor without data stands in their place; only this package's native code looks at that.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

PACKED = "packed"
LOCK = threading.RLock()  # of everything that packs, gives up or computes integers
_OWN_REFERENCES = 3  # to a tensor that a dict holds: the dict's, a local one, an argument
_OWN_STORAGES = 2  # to its memory: the tensor's, and that of the object that tells


class LazyBuffers(dict):
    """The buffers of a layer, its integers computed when somebody asks for them.

    Args:
        layer: whose buffers these become.
        panels: what its integers were packed to.
        unpack: gives the integers.
    """

    def __init__(self, layer: nn.Module, panels: Any, unpack: Callable[[], Tensor]) -> None:
        super().__init__(layer._buffers)
        packed = dict.__getitem__(self, PACKED)
        dict.__setitem__(self, PACKED, torch.empty_like(packed, device="meta"))
        self.panels, self._unpack = panels, unpack
        self._layer = weakref.ref(layer)
        layer.__dict__["_buffers"] = self

    def restore(self) -> None:
        """Hold the integers again, in the plain dict of buffers that the layer had."""
        with LOCK:
            if self.panels is None:
                return
            dict.__setitem__(self, PACKED, self._unpack())
            self.panels = None
            del self._unpack  # and the panels with it
            layer = self._layer()
            if layer is not None and layer.__dict__["_buffers"] is self:
                layer.__dict__["_buffers"] = dict(self)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Copies and pickles are plain; this one stays as it is."""
        with LOCK:
            content = {name: dict.__getitem__(self, name) for name in dict.keys(self)}
            if self.panels is not None:
                content[PACKED] = self._unpack()
        return dict, (content,)


def _restoring(name: str) -> Callable[..., Any]:
    """dict's method, called on all names or on that of the integers only once they are there."""
    method = getattr(dict, name)

    def call(self: LazyBuffers, *arguments: Any) -> Any:
        if not arguments or arguments[0] == PACKED:
            self.restore()
        return method(self, *arguments)

    return call


# `__iter__` is among them so that dict(buffers) and {**buffers} ask for each name.
_OF_A_NAME = ("__getitem__", "__setitem__", "__delitem__", "get", "pop", "setdefault")
_OF_ALL = ("__iter__", "__repr__", "clear", "copy", "items", "popitem", "values")
for _name in (*_OF_A_NAME, *_OF_ALL):
    setattr(LazyBuffers, _name, _restoring(_name))


def panels_of(layer: nn.Module) -> Any:
    """The panels that hold a layer's integers; None where the layer itself does."""
    buffers = layer._buffers
    return buffers.panels if isinstance(buffers, LazyBuffers) else None


def shown(layer: nn.Module) -> Tensor:
    """The integers of a layer, or a tensor like them without data where only panels hold them."""
    return dict.__getitem__(layer._buffers, PACKED)


def held(layer: nn.Module) -> list[Tensor]:
    """The tensors that a module itself holds."""
    tensors = (*layer._parameters.values(), *dict.values(layer._buffers))
    missing = shown(layer) if panels_of(layer) is not None else None
    return [tensor for tensor in tensors if tensor is not None and tensor is not missing]


def holds_alone(tensors: dict, name: str = PACKED) -> bool:
    """Whether nobody but a layer has one of its tensors, by another name, a view or a state dict.

    Args:
        tensors: the layer's buffers or parameters.
        name: of the tensor.
    """
    tensor = dict.__getitem__(tensors, name)
    if type(tensor) not in (Tensor, nn.Parameter):
        return False
    if not tensor.is_contiguous() or tensor.is_inference():
        return False
    if sys.getrefcount(tensor) > _OWN_REFERENCES:
        return False
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) <= _OWN_STORAGES
