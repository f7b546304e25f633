"""step.cpp compiled for this CPU, kept in the user's cache folder, and mapped only after its
content was verified.

A kept file ends with the SHA-256 digest of what stands before it. It is read through one
descriptor, and only if folder and file belong to this user and nobody else may write to them; then
the verified bytes are mapped from a private copy. So a file that is cut short, emptied, replaced or
exchanged at the last moment is compiled again, and none can take the process down. Left out: a
cache for several users, Windows.
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
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from quantize.checkpoint.atomic import atomic_write
from quantize.run.decoding.structs import decode_function

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SOURCE, HEADER = Path(__file__).with_name("step.cpp"), Path(__file__).with_name("numbers.h")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)
# it takes 3 s; a compiler that hangs is stopped, and others wait no longer for its result
COMPILER_S = 120.0
MOST_BYTES = 1 << 26
DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Library:
    """What step.cpp exports."""

    decode: Callable[..., None]
    note: str | None = None  # why it isn't kept for the next process; None if it is


_outcome: Library | OSError | None = (
    None  # of this process: a compiler that failed isn't asked again
)
_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()  # whoever held it isn't in this process


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def library(*, compile_now: bool = True) -> Library | None:
    """The compiled step.cpp: loaded before, kept by an earlier process, or compiled now.

    Args:
        compile_now: False returns None where it would have to be compiled.

    Raises: OSError: it can't be compiled or loaded here; the message says why. Said again without a
        new try in this process.
    """
    global _outcome
    with _lock:
        if _outcome is None:
            try:
                _outcome = _find(compile_now)
            except OSError as error:
                _outcome = error
        if isinstance(_outcome, OSError):
            raise OSError(*_outcome.args)
        return _outcome


def _find(compile_now: bool) -> Library | None:
    if fcntl is None:
        raise OSError("native code is for POSIX systems")
    compiler = _compiler()
    if compiler is None:
        raise OSError("there is no C++ compiler (g++ or clang++, or the one that CXX names)")
    name = f"step-{_key(tuple(compiler))}.so"
    try:
        path, folder = _open_folder()
    except OSError as error:
        return (
            _loaded(_compile(compiler), f"compiled for this process only: {error}")
            if compile_now
            else None
        )
    try:
        found = _kept(folder, name)
        if found is not None or not compile_now:
            return found
        with _one_builder(folder):
            found = _kept(folder, name)  # by another process while this one waited
            if found is not None:
                return found
            content = _compile(compiler)
            made = _loaded(content)
            return Library(made.decode, _keep(content, path / name))
    finally:
        os.close(folder)


def _compiler() -> list[str] | None:
    """The compiler's command, or None."""
    for command in (shlex.split(os.environ.get("CXX", "")) or ["g++"], ["clang++"]):
        program = shutil.which(command[0])
        if program is not None:
            return [program, *command[1:]]
    return None


@functools.cache
def _key(compiler: tuple[str, ...]) -> str:
    """Names a library by its source and by what the compiler knows of this CPU: machines may share
    a folder.
    """
    target = _run([*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]).stdout
    parts = (SOURCE.read_bytes(), HEADER.read_bytes(), target, " ".join(FLAGS).encode())
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _compile(compiler: list[str]) -> bytes:
    """The content of the shared library."""
    with tempfile.TemporaryDirectory(prefix="quantize-") as scratch:
        made = Path(scratch) / "made.so"
        for threads in (("-fopenmp",), ()):  # a compiler without OpenMP gives one thread
            done = _run([*compiler, *FLAGS, *threads, str(SOURCE), "-o", str(made)])
            if done.returncode == 0:
                return made.read_bytes()
    message = done.stderr.decode(errors="replace").strip()
    raise OSError(f"{compiler[0]} can't compile {SOURCE.name}: {message[-500:]}")


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    """Run a compiler for at most COMPILER_S; it and all that it started are stopped then. Raises
    OSError.
    """
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, start_new_session=True) as process:
        try:
            output, errors = process.communicate(timeout=COMPILER_S)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise OSError(f"{command[0]} took over {COMPILER_S:g} s and was stopped") from None
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


# ------------------------------------------------------------------------------------------------
# the folder


def _open_folder() -> tuple[Path, int]:
    """The folder of compiled code and a descriptor of it. Raises OSError, saying why nothing is
    kept there.
    """
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        folder = (base if base.is_absolute() else Path.home() / ".cache") / "quantize"
    except RuntimeError as error:
        raise OSError(f"there is no home folder ({error})") from None
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    fault = _fault(os.fstat(descriptor))
    if fault is not None:
        os.close(descriptor)
        raise OSError(f"{folder} {fault}")
    return folder, descriptor


def _fault(status: os.stat_result) -> str | None:
    """Why a file or folder isn't trusted; None if it is this user's alone."""
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}, not to {os.geteuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"may be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    return None


@contextlib.contextmanager
def _one_builder(folder: int) -> Iterator[None]:
    """Lets one process compile while others wait for it; after COMPILER_S, or where nothing can be
    locked, they go on.
    """
    deadline = time.monotonic() + COMPILER_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:
            break
    yield  # the lock ends with the descriptor


def _kept(folder: int, name: str) -> Library | None:
    """The library kept in a file; None if there is none, or not one to trust."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or _fault(status) or status.st_size > MOST_BYTES:
            return None
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read()
        content, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
        return _loaded(content) if hashlib.sha256(content).digest() == digest else None
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _keep(content: bytes, path: Path) -> str | None:
    """Write a library with its digest, in one step; returns why it couldn't be kept."""
    try:
        if path.is_symlink():
            path.unlink()
        with atomic_write(path) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(content + hashlib.sha256(content).digest())
    except OSError as error:
        return f"compiled for this process only: {error}"
    return None


def _loaded(content: bytes, note: str | None = None) -> Library:
    return Library(decode_function(_map(content)), note)


def _map(content: bytes) -> ctypes.CDLL:
    """Load a library from a private copy, so that no later change of a file reaches it. Raises
    OSError.
    """
    with contextlib.suppress(
        AttributeError, OSError
    ):  # systems without files in memory, or that don't execute them
        descriptor = os.memfd_create("quantize-step")
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        # The descriptor stays open: the loader would take a second library of the same path for the
        # first.
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    with tempfile.TemporaryDirectory(prefix="quantize-") as scratch:
        path = Path(scratch) / "step.so"
        path.write_bytes(content)
        return ctypes.CDLL(str(path))
