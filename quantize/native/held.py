"""Whether Python's containers hold what they held, in one native call (int8.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from itertools import chain
from typing import Any

from quantize.native.int8_library import functions

Entry = tuple[dict[Any, Any], Any, Any]  # a dictionary, a key in it and its value
_API = ctypes.pythonapi.PyDict_GetItemWithError, ctypes.pythonapi.PyObject_Size
_CALLED = [ctypes.cast(function, ctypes.c_void_p).value for function in _API]
_NOTHING = object()


class Held:
    """Values in dictionaries, by their keys, and how much some containers hold."""

    def __init__(self, entries: Sequence[Entry], containers: Sequence[Collection[Any]]) -> None:
        # they live as long as this, so nothing else gets their identities
        self.entries, self.containers = entries, containers
        self.sizes = [*map(len, containers)]
        numbers = [*map(id, chain.from_iterable(entries))]
        for container, size in zip(containers, self.sizes, strict=True):
            numbers += id(container), 0, size
        self.numbers = (ctypes.c_void_p * len(numbers))(*numbers)
        self.arguments = ctypes.addressof(self.numbers), len(numbers) // 3, *_CALLED
        try:
            self.compute = functions().are_held
        except OSError:
            self.compute = self._are_held

    def are_there(self) -> bool:
        """Is each key there, its value the very object that it was, and nothing more?"""
        return bool(self.compute(*self.arguments))

    def _are_held(self, *_: Any) -> bool:
        """Where there is no native code."""
        if self.sizes != [*map(len, self.containers)]:
            return False
        return all(holder.get(key, _NOTHING) is value for holder, key, value in self.entries)
