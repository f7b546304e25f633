"""What the kernels have in common on Python's side: the check of a library's symbols, and copies of
weights in a kernel's layout. They lie outside of the modules, so that no copy, move or file carries
a stale one along.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T", bound="Copy")
NUMBER, POINTER, FLOAT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
Fields = list[tuple[str, Any]]


def fields(*kinds: tuple[Any, str]) -> Fields:
    """Of a struct: a type and the names that have it, one after the other."""
    found: Fields = []
    for kind, names in kinds:
        found += [(name, kind) for name in names.split()]
    return found


def sizes(*structs: type[ctypes.Structure]) -> dict[str, int]:
    """What a library says in the constants that are named after its structs."""
    return {f"{one.__name__.lower()}_bytes": ctypes.sizeof(one) for one in structs}


def symbols(library: ctypes.CDLL, names: Sequence[str], sizes: Mapping[str, int]) -> list[Any]:
    """Functions of a compiled library by name. Raises OSError for a library that lacks one, or
    whose constants of these names say other sizes of structs.
    """
    try:
        own = [ctypes.c_int64.in_dll(library, name).value for name in sizes]
        found = [getattr(library, name) for name in names]
    except (AttributeError, ValueError) as error:
        raise OSError(f"the compiled library lacks a symbol: {error}") from None
    if own != list(sizes.values()):
        expected = list(sizes.values())
        raise OSError(f"the compiled library has structs of {own} bytes, not of {expected}")
    return found


def versions_of(tensors: Sequence[Tensor | None]) -> tuple[int | None, ...]:
    """How often each was changed; None where nobody counts, -1 for one that is missing."""
    found: list[int | None] = []
    for tensor in tensors:
        if tensor is None:
            found.append(-1)
        else:
            found.append(None if tensor.is_inference() else tensor._version)
    return tuple(found)


class Copy:
    """A copy of a weight in a kernel's layout.

    Args:
        weight: int8.
        how: what else the layout depends on.
        owner: of the weight.
    """

    def __init__(self, weight: Tensor, how: Any, owner: weakref.ref[Tensor]) -> None:
        self.owner, self.version, self.pointer = owner, weight._version, weight.data_ptr()
        self.how = how

    def is_of(self, weight: Tensor, how: Any = None) -> bool:
        """Was it made of this weight, as it is now?"""
        return (
            self.owner() is weight
            and self.version == weight._version
            and self.pointer == weight.data_ptr()
            and (self.how is how or self.how == how)
        )


class Pack(Copy):
    """With the vectors that it was last called with."""

    def __init__(self, weight: Tensor, how: Any, owner: weakref.ref[Tensor]) -> None:
        super().__init__(weight, how, owner)
        self.vectors: tuple[Tensor | None, ...] = ()  # the scale and bias given last,
        self.versions: tuple[int | None, ...] = ()
        self.blocked_vectors: list[Tensor | None] = []  # and what the kernel reads of them

    def blocked(self, tensor: Tensor) -> Tensor:
        """[outputs, ...] in the kernel's order, missing outputs as zeros."""
        raise NotImplementedError

    def are_held(self, vectors: tuple[Tensor | None, ...]) -> bool:
        """Are these the vectors given last, as they were?"""
        same = len(vectors) == len(self.vectors) and all(map(operator.is_, vectors, self.vectors))
        versions = versions_of(vectors)
        return same and versions == self.versions and None not in versions

    def pointers(self, *vectors: Tensor | None) -> list[int | None]:
        """Where the kernel finds these. This object holds them until it is asked for others."""
        if not self.are_held(vectors):
            blocked = [None if v is None else self.blocked(v.float()) for v in vectors]
            self.vectors, self.versions = vectors, versions_of(vectors)
            self.blocked_vectors = blocked
        return [None if v is None else v.data_ptr() for v in self.blocked_vectors]


class Packs(Generic[T]):
    """Packed copies by the identity of a weight, until it dies or changes. make: as `Copy`."""

    def __init__(self, make: Callable[[Tensor, Any, weakref.ref[Tensor]], T]) -> None:
        self.make = make
        self.known: dict[int, T] = {}

    def of(self, weight: Tensor, how: Any = None) -> T:
        """`weight` in the kernel's layout."""
        key = id(weight)
        found = self.known.get(key)
        if found is None or not found.is_of(weight, how):
            owner = weakref.ref(weight, functools.partial(self._forget, key))
            found = self.known[key] = self.make(weight, how, owner)
        return found

    def _forget(self, key: int, owner: weakref.ref[Tensor]) -> None:
        found = self.known.get(key)
        if found is not None and found.owner is owner:
            del self.known[key]
