"""What a cache holds as step.cpp reads it, noted once for as long as the cache keeps its tensors.

Checking a few hundred tensors takes a tenth of the time of a token, and the caches of several texts
are checked at every step of a server. What is noted holds no tensor alive.
"""

from __future__ import annotations

import ctypes
import operator
import weakref
from itertools import chain
from weakref import WeakKeyDictionary

import torch

from quantize.allocator import use_huge_pages
from quantize.run.decoding.structs import Held
from quantize.run.kv_cache import KVCache

Shapes = list[tuple[int, int]]
# A cache of so many bytes is moved into huge pages after so many passes over a single token: that
# takes as long as it saves in some tens of them.
LONG_BYTES, MANY_STEPS = 16 << 20, 32
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


class View:
    """The layers of a cache with tensors that step.cpp can read and write.

    Args:
        store: the layers.
        held: what they hold.
        shapes: heads and width of each layer.
    """

    def __init__(self, store: list, held: ctypes.Array[Held], shapes: Shapes) -> None:
        self.store, self.held, self.shapes = store, held, shapes
        self.address = ctypes.addressof(held)
        self.dtype: torch.dtype = store[0].tensors["k"].dtype
        self._tensors = [weakref.ref(tensor) for tensor in _tensors(store)]
        self._firsts = [layer.first for layer in store]
        self._room = min(layer.first + layer.capacity for layer in store)
        self._steps = 0

    def fits(self, cache: KVCache, end: int) -> bool:
        """Whether the cache still holds these tensors alone, with room for `end` positions."""
        if end > self._room:
            return False
        if cache.limit is not None and end > cache.limit:
            return False
        if any(layer.sharers[0] > 1 for layer in self.store):
            return False
        if [layer.first for layer in self.store] != self._firsts:
            return False
        tensors = list(_tensors(self.store))
        noted = [reference() for reference in self._tensors]
        return len(tensors) == len(noted) and all(map(operator.is_, tensors, noted))

    def count_step(self) -> None:
        """Note a pass over a single token."""
        self._steps += 1
        if self._steps != MANY_STEPS:
            return
        blocks = [(tensor.data_ptr(), tensor.nbytes) for tensor in _tensors(self.store)]
        if sum(size for _, size in blocks) >= LONG_BYTES:
            use_huge_pages(blocks)


_views: WeakKeyDictionary[KVCache, View] = WeakKeyDictionary()


def view_of(
    cache: KVCache, shapes: Shapes, new: int, dtype: torch.dtype | None = None
) -> View | None:
    """What a cache holds, with room for more.

    Args:
        cache: on the CPU.
        shapes: heads and width of each layer of the model that reads it.
        new: positions that will be written.
        dtype: of keys, for a cache that holds nothing; None refuses such a one.

    Returns:
        The view; None where step.cpp can't write into the cache, or it has other shapes.

    Raises:
        ValueError: beyond the cache's limit.
    """
    view = _views.get(cache)
    if view is not None and view.shapes == shapes and view.fits(cache, cache.length + new):
        if new == 1:
            view.count_step()
        return view
    if cache.shapes != shapes:
        return None
    store = cache.open(new, dtype)
    held = None if store is None else held_by(store, cache.batch, cache.length, new)
    if store is None or held is None:
        return None
    view = _views[cache] = View(store, held, shapes)
    return view


def held_by(store: list, batch: int, length: int, tokens: int) -> ctypes.Array[Held] | None:
    """What each layer of a cache holds, as step.cpp reads it; None unless every tensor is what
    step.cpp takes it for.
    """
    dtype = store[0].tensors["k"].dtype
    if dtype not in DTYPES:
        return None
    held = (Held * len(store))()
    for to, layer in zip(held, store, strict=True):
        shape = (batch, layer.kv_heads, layer.capacity)
        expected = {"k": (dtype, layer.head_dim), "v": (dtype, layer.head_dim)}
        if dtype is torch.int8:
            expected |= {"k_scale": (torch.bfloat16, 1), "v_scale": (torch.bfloat16, 1)}
        if expected.keys() != layer.tensors.keys():
            return None
        if not 0 <= layer.first <= length or length + tokens - layer.first > layer.capacity:
            return None
        for name, tensor in layer.tensors.items():
            kind, width = expected[name]
            as_expected = (
                tensor.dtype is kind
                and tensor.shape == (*shape, width)
                and tensor.device.type == "cpu"
            )
            if not as_expected or not tensor.is_contiguous():
                return None
            setattr(to, name, tensor.data_ptr())
        to.capacity, to.first, to.window = layer.capacity, layer.first, layer.window or 0
    return held


def _tensors(store: list) -> chain:
    return chain.from_iterable(layer.tensors.values() for layer in store)
