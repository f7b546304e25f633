"""C++ of this package compiled for this CPU, kept in the user's cache folder (see `cache`), and
mapped only after its content was verified.

What is mapped is a private copy of the verified bytes, so no later change of a file reaches a
running process. Left out: Windows.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.native import cache

FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
NUMBERS = Path(__file__).with_name("numbers.h")
# it takes 3 s; a compiler that hangs is stopped, and others wait no longer for its result
COMPILER_S = 120.0


@dataclass(frozen=True)
class Code:
    """A library to be compiled.

    Args:
        name: the kept file's name starts with it.
        source: the file to compile.
        headers: what it includes of this package. They stand beside it or in this folder.
        flags: of the compiler, added to FLAGS: the instruction set among them.
        read: gives the functions of the mapped library. Raises OSError for one that isn't a
            library of this version's source.
    """

    name: str
    source: Path
    headers: tuple[Path, ...]
    flags: tuple[str, ...]
    read: Callable[[ctypes.CDLL], Any]


@dataclass(frozen=True)
class Library:
    """What a compiled library exports."""

    functions: Any  # what the `read` of its Code gave
    note: str | None = None  # why it isn't kept for the next process; None if it is


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
    """The compiled code: loaded before, kept by an earlier process, or compiled now.

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
            raise OSError(*outcome.args)
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
    command = compiler()
    if command is None:
        raise OSError("there is no C++ compiler (g++ or clang++, or the one that CXX names)")
    name = file_name(code, command)
    try:
        path, folder = cache.open_folder()
    except OSError as error:
        if not compile_now:
            return None
        note = f"compiled for this process only: {error}"
        return Library(code.read(_map(_compile(code, command))), note)
    try:
        found = _kept(code, folder, name)
        if found is not None or not compile_now:
            return found
        with cache.one_builder(folder, COMPILER_S):
            found = _kept(code, folder, name)  # by another process while this one waited
            if found is not None:
                return found
            content = _compile(code, command)
            functions = code.read(_map(content))
            return Library(functions, cache.keep(content, path / name))
    finally:
        os.close(folder)


def _kept(code: Code, folder: int, name: str) -> Library | None:
    content = cache.kept(folder, name)
    if content is None:
        return None
    try:
        return Library(code.read(_map(content)))
    except OSError:
        return None


def compiler() -> list[str] | None:
    """The compiler's command, or None."""
    for command in (shlex.split(os.environ.get("CXX", "")) or ["g++"], ["clang++"]):
        program = shutil.which(command[0])
        if program is not None:
            return [program, *command[1:]]
    return None


def file_name(code: Code, command: list[str]) -> str:
    """The name of the kept file: it tells sources, flags, and what the compiler knows of the CPU,
    since machines may share a folder.
    """
    return f"{code.name}-{_key(code, tuple(command))}.so"


@functools.cache
def _key(code: Code, command: tuple[str, ...]) -> str:
    macros = _run([*command, *code.flags, "-dM", "-E", "-x", "c++", os.devnull]).stdout
    files = [path.read_bytes() for path in (code.source, *code.headers)]
    flags = " ".join(FLAGS + code.flags).encode()
    return hashlib.sha256(b"".join([*files, macros, flags])).hexdigest()[:16]


def _compile(code: Code, command: list[str]) -> bytes:
    """The content of the shared library."""
    include = f"-I{Path(__file__).parent}"
    with tempfile.TemporaryDirectory(prefix="quantize-") as scratch:
        made = Path(scratch) / "made.so"
        call = [*command, *FLAGS, *code.flags, include, str(code.source), "-o", str(made)]
        for threads in (["-fopenmp"], []):  # a compiler without OpenMP gives one thread
            done = _run([*call, *threads])
            if done.returncode == 0:
                return made.read_bytes()
    message = done.stderr.decode(errors="replace").strip()
    raise OSError(f"{command[0]} can't compile {code.source.name}: {message[-500:]}")


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    """Run a compiler for at most COMPILER_S; it and all that it started are stopped then. Raises
    OSError.
    """
    nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(
        command, stdin=nothing, stdout=pipe, stderr=pipe, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=COMPILER_S)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise OSError(f"{command[0]} took over {COMPILER_S:g} s and was stopped") from None
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


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
