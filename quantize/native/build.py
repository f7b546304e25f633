"""C++ of this package as loaded libraries: carried by the installed wheel, kept in the user's cache
folder (see `cache`), or compiled now (see `toolchain`); looked for in this order.

Libraries have a plain C interface, and call the C library and OpenMP's alone, so no version of
Python or torch is part of their names: a wheel's serve as long as the sources are theirs. What is
mapped is a private copy of verified bytes, so no later change of a file reaches a running process.
Left out: Windows.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantize.native import cache, isa, toolchain
from quantize.native.toolchain import Target, UnavailableError, compiler

CARRIED = Path(__file__).with_name("carried")  # of a wheel; see setup.py


@dataclass(frozen=True)
class Code(Target):
    """A library to be found or compiled.

    Args:
        read: gives the functions of the mapped library, among them `open_library`, which returns 0
            if this process may use the level's instructions. Raises OSError for one that isn't a
            library of this version's source.
    """

    read: Callable[[ctypes.CDLL], Any]


@dataclass(frozen=True)
class Library:
    """What a compiled library exports."""

    functions: Any  # what the `read` of its Code gave
    level: str
    origin: str  # "carried", "kept" or "compiled"
    note: str | None = None  # why it isn't kept for the next process; None if it is


@dataclass(frozen=True)
class Kernels:
    """A source of this package, as a library for each level of `isa`.

    Args: as of Code.
    """

    source: Path
    read: Callable[[ctypes.CDLL], Any]

    def code(self, level: str) -> Code:
        """For one level."""
        return Code(self.source, level, self.read)

    def best(self) -> Library:
        """For the best level that this process may use and that can be had, compiled now if need
        be.

        Raises: OSError: there is none; the message says why there isn't even one for the least
            level. ValueError: QUANTIZE_ISA names no level.
        """
        found = self.find()
        assert found is not None
        return found

    def find(self, *, compile_now: bool = True) -> Library | None:
        """As `best`; compile_now: False returns None where it would have to be compiled."""
        problems: list[UnavailableError] = []
        for level in reversed(isa.levels()):
            try:
                found = library(self.code(level), compile_now=compile_now)
            except UnavailableError as error:
                problems.append(error)
                continue
            if found is None or found.functions.open_library() == 0:
                return found
        refused = "this process may not use the instruction sets that the CPU has"
        raise problems[-1] if problems else OSError(refused)


# By code, of this process: a compiler that failed isn't asked again.
_outcomes: dict[Code, Library | OSError] = {}
_has_warned = False  # that nothing is kept
_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()  # whoever held it isn't in this process


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def library(code: Code, *, compile_now: bool = True) -> Library | None:
    """The compiled code: loaded before, carried, kept by an earlier process, or compiled now.

    Args:
        code: what to compile and how.
        compile_now: False returns None where it would have to be compiled.

    Raises: OSError: it can't be compiled or loaded here; the message says why. Said again without a
        new try in this process.
    """
    with _lock:
        outcome = _outcomes.get(code)
        if outcome is None:
            try:
                outcome = _find(code, compile_now)
            except OSError as error:
                outcome = error
            if outcome is not None:
                _outcomes[code] = outcome
        if isinstance(outcome, Library) and outcome.note:
            _warn_once(outcome.note)
        if isinstance(outcome, OSError):
            raise type(outcome)(*outcome.args)
        return outcome


def _warn_once(note: str) -> None:
    global _has_warned
    if _has_warned:
        return
    _has_warned = True
    warnings.warn(
        f"native code is {note}. Every process spends some seconds on that; XDG_CACHE_HOME can "
        f"name another folder to keep it in",
        stacklevel=4,
    )


def _find(code: Code, compile_now: bool) -> Library | None:
    if cache.fcntl is None:
        raise OSError("native code is for POSIX systems")
    problem = ""
    try:
        return _carried(code)
    except FileNotFoundError:
        pass  # the source tree, a wheel built without a compiler, or one of other sources
    except OSError as error:
        problem = f"; the one that the package carries: {error}"
    command = compiler()
    if command is None:
        told = "there is no C++ compiler (g++ or clang++, or the one that CXX names)"
        raise UnavailableError(told + problem)
    name = toolchain.kept_name(code, tuple(command))
    try:
        path, folder = cache.open_folder()
    except OSError as error:
        if not compile_now:
            return None
        note = f"compiled for this process only: {error}"
        return _loaded(code, toolchain.compiled(code, command), "compiled", note)
    try:
        found = _kept(code, folder, name)
        if found is not None or not compile_now:
            return found
        with cache.one_builder(folder, toolchain.COMPILER_S):
            found = _kept(code, folder, name)  # by another process while this one waited
            if found is not None:
                return found
            content = toolchain.compiled(code, command)
            library = _loaded(code, content, "compiled")
            return replace(library, note=cache.keep(content, path / name))
    finally:
        os.close(folder)


def _carried(code: Code) -> Library:
    """The installed package is as trusted as its Python files, but may be damaged."""
    path = CARRIED / code.name()
    content = toolchain.opened(path.read_bytes())
    if content is None:
        raise OSError(f"{path} is damaged")
    return _loaded(code, content, "carried")


def _kept(code: Code, folder: int, name: str) -> Library | None:
    content = cache.kept(folder, name)
    if content is None:
        return None
    try:
        return _loaded(code, content, "kept")
    except OSError:
        return None


def _loaded(code: Code, content: bytes, origin: str, note: str | None = None) -> Library:
    return Library(code.read(_map(content)), code.level, origin, note)


def _map(content: bytes) -> ctypes.CDLL:
    """Load a library from a private copy. Raises OSError."""
    with contextlib.suppress(
        AttributeError, OSError
    ):  # systems without files in memory, or that don't execute them
        descriptor = os.memfd_create("quantize-native")
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        # The descriptor stays open: the loader would take a second library of the same path for the
        # first.
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    with tempfile.TemporaryDirectory(prefix="quantize-") as scratch:
        path = Path(scratch) / "native.so"
        path.write_bytes(content)
        return ctypes.CDLL(str(path))
