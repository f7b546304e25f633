"""The user's cache folder of compiled code, and what of it is trusted.

A kept file ends with the SHA-256 digest of what stands before it. It is read through one
descriptor, and only if folder and file belong to this user and nobody else may write to them. So a
file that is cut short, emptied or replaced is not taken. Left out: a cache for several users.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantize.atomic import atomic_write
from quantize.native.toolchain import opened, sealed

try:
    import fcntl as _fcntl
except ImportError:  # Windows
    _fcntl = None
fcntl: Any = _fcntl

MOST_BYTES = 1 << 26


def open_folder() -> tuple[Path, int]:
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
    found = fault(os.fstat(descriptor))
    if found is not None:
        os.close(descriptor)
        raise OSError(f"{folder} {found}")
    return folder, descriptor


def fault(status: os.stat_result) -> str | None:
    """Why a file or folder isn't trusted; None if it is this user's alone."""
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}, not to {os.geteuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"may be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    return None


@contextlib.contextmanager
def one_builder(folder: int, seconds: float) -> Iterator[None]:
    """Lets one process compile while others wait for it; after `seconds`, or where nothing can be
    locked, they go on.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:
            break
    yield  # the lock ends with the descriptor


def kept(folder: int, name: str) -> bytes | None:
    """The library kept in a file; None if there is none, or not one to trust."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or fault(status) or status.st_size > MOST_BYTES:
            return None
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read()
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return opened(data)


def keep(content: bytes, path: Path) -> str | None:
    """Write a library with its digest, in one step; returns why it couldn't be kept."""
    try:
        if path.is_symlink():
            path.unlink()
        with atomic_write(path) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(sealed(content))
    except OSError as error:
        return f"compiled for this process only: {path.parent}: {error.strerror or error}"
    return None
