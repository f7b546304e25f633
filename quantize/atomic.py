"""Replace a file in one step, so that a crash, a kill or a full disk never leaves half of it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl as _fcntl
except ImportError:  # Windows: temporary files of killed writers stay
    _fcntl = None
fcntl: Any = _fcntl


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Give a binary file to write (and read back) that becomes `path` when the block ends, and
    leaves no trace when it fails.

    Whoever reads `path`, at any moment and after any crash, sees the old content or the new, whole.
    Raises OSError.
    """
    path = Path(os.path.realpath(path))  # write through a link, don't replace it
    if path.is_dir():
        raise IsADirectoryError(21, "Is a directory", str(path))
    _remove_abandoned(path)
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("x+b") as file:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            unnamed = error.filename is None  # of a write
            if unnamed or error.filename == str(temporary):
                error.filename = str(path)
        raise
    with contextlib.suppress(OSError):  # not every system can sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _remove_abandoned(path: Path) -> None:
    """A killed writer leaves its temporary file behind: the next one removes those that nobody
    holds.
    """
    pattern = re.compile(re.escape(f".{path.name[:200]}.") + r"[0-9a-f]{12}\.tmp")
    with contextlib.suppress(OSError):
        for old in path.parent.iterdir() if fcntl else ():
            if pattern.fullmatch(old.name):
                with contextlib.suppress(OSError), old.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    old.unlink()
