"""Integers that a layer doesn't hold beside their panels.

A layer that alone holds its buffers gives its integers up once they are packed, so that they lie in
memory once. Whoever asks for a buffer, by an attribute, a list of buffers, a state dict, a copy or
a file, finds all of them where they were: they are computed from the panels, bit for bit, and held
again. A tensor without data stands in their place; only this package's native code looks at that.
So nothing of such a layer's buffers changes before one of them is asked for, which is counted.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LOCK = threading.RLock()  # of everything that packs, gives up or computes integers
_OWN_REFERENCES = 3  # to a tensor that a dict holds: the dict's, a local one, an argument
_OWN_STORAGES = 2  # to its memory: the tensor's, and that of the object that tells


class LazyBuffers(dict):
    """The buffers of a layer, its integers computed when somebody asks for any of them.

    Args:
        layer: whose buffers these become.
        panels: what its integers were packed to.
        names: of the integers.
        unpack: gives them, in the order of `names`.
    """

    restored = 0  # how many layers hold their integers again

    def __init__(
        self,
        layer: nn.Module,
        panels: Any,
        names: Sequence[str],
        unpack: Callable[[], Sequence[Tensor]],
    ) -> None:
        super().__init__(layer._buffers)
        for name in names:
            tensor = dict.__getitem__(self, name)
            dict.__setitem__(self, name, torch.empty_like(tensor, device="meta"))
        self.panels, self.names, self._unpack = panels, names, unpack
        self._layer = weakref.ref(layer)
        self._plain: dict | None = None
        layer.__dict__["_buffers"] = self

    def restore(self) -> dict:
        """The plain dict of buffers that the layer has again, with the integers."""
        with LOCK:
            if self._plain is None:
                self._plain = self._content()
                LazyBuffers.restored += 1
                self.panels = None
                del self._unpack  # and the panels with it
                layer = self._layer()
                if layer is not None and layer.__dict__["_buffers"] is self:
                    layer.__dict__["_buffers"] = self._plain
            return self._plain

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Copies and pickles are plain; this one stays as it is."""
        with LOCK:
            return dict, (self._plain or self._content(),)

    def _content(self) -> dict:
        computed = dict(zip(self.names, self._unpack(), strict=True))
        return {name: computed.get(name, tensor) for name, tensor in dict.items(self)}


def _restoring(name: str) -> Callable[..., Any]:
    """dict's method, called on the layer's buffers once the integers are there."""
    method = getattr(dict, name)

    def call(self: LazyBuffers, *arguments: Any, **named: Any) -> Any:
        return method(self.restore(), *arguments, **named)

    return call


# `__iter__` is among them so that dict(buffers) and {**buffers} ask for each name.
_OF_A_NAME = ("__getitem__", "__setitem__", "__delitem__", "get", "pop", "setdefault")
_OF_ALL = ("__iter__", "__repr__", "clear", "copy", "items", "popitem", "update", "values")
_OF_TWO = ("__eq__", "__ne__", "__or__", "__ror__", "__ior__")
for _name in (*_OF_A_NAME, *_OF_ALL, *_OF_TWO):
    setattr(LazyBuffers, _name, _restoring(_name))


def panels_of(layer: nn.Module) -> Any:
    """The panels that hold a layer's integers; None where the layer itself does."""
    buffers = layer._buffers
    return buffers.panels if isinstance(buffers, LazyBuffers) else None


def shown(layer: nn.Module) -> dict[str, Any]:
    """The buffers of a layer, with tensors without data where only panels hold them."""
    return dict(dict.items(layer._buffers))


def held(layer: nn.Module) -> list[Tensor]:
    """The tensors that a module itself holds."""
    tensors = [*layer._parameters.values(), *dict.values(layer._buffers)]
    if panels_of(layer) is not None:
        buffers: Any = layer._buffers
        missing = {id(dict.__getitem__(buffers, name)) for name in buffers.names}
        tensors = [tensor for tensor in tensors if id(tensor) not in missing]
    return [tensor for tensor in tensors if tensor is not None]


def holds_alone(tensors: dict, name: str) -> bool:
    """Whether nobody but a layer has one of its tensors, by another name, a view or a state dict.

    Args:
        tensors: the layer's buffers or parameters.
        name: of the tensor, or of one that there isn't.
    """
    tensor = dict.__getitem__(tensors, name)
    if tensor is None:
        return True
    if type(tensor) not in (Tensor, nn.Parameter):
        return False
    if not tensor.is_contiguous() or tensor.is_inference():
        return False
    if sys.getrefcount(tensor) > _OWN_REFERENCES:
        return False
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) <= _OWN_STORAGES
