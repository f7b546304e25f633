"""Open files that somebody else wrote: only regular ones, with every fault of theirs told as one
kind of error.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

SUFFIXES = (".pth", ".safetensors")
# values in JSON, each of which takes up to 200 bytes once it is parsed; a tensor has 13
MAX_VALUES = 700_000


class CheckpointError(ValueError):
    """A file that can't be loaded: the message has its path and the reason."""


def require(condition: object, reason: str) -> None:
    if not condition:
        raise CheckpointError(reason)


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """The file, for reading; whatever goes wrong in the block is the file's fault and becomes a
    CheckpointError.
    """
    path = Path(path)
    with blaming(path):
        require(path.suffix in SUFFIXES, f"a checkpoint's name ends in {' or '.join(SUFFIXES)}")
        with open_regular(path) as file:
            yield file


@contextlib.contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Whatever goes wrong in the block becomes a CheckpointError with `path` and the reason, in one
    line.
    """
    try:
        yield
    except CheckpointError as error:
        reason = str(error)
    except OSError as error:
        reason = error.strerror or str(error)
    except Exception as error:  # parsers of hostile bytes raise nearly anything
        reason = (
            str(error)
            if type(error) is ValueError
            else f"can't be loaded ({type(error).__name__}: {error})"
        )
    else:
        return
    reason = " ".join(reason.split())
    named = reason if reason.startswith(str(path)) else f"{path}: {reason}"
    raise CheckpointError(named[: len(str(path)) + 500])


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, never a folder, a device or a pipe, which could block or never
    end.
    """
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        folder = " but a folder (DecoderLM.from_pretrained reads folders of published models)"
        raise CheckpointError("not a regular file" + (folder if stat.S_ISDIR(mode) else ""))
    return os.fdopen(descriptor, "rb")


def from_json(text: str | bytes) -> Any:
    """The value of a JSON text with no key twice and not so many values that they take far more
    memory than the text.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        require(len(content) == len(pairs), "a key twice in its JSON")
        return content

    text = text if isinstance(text, str) else text.decode()
    values = text.count(",") + text.count("[") + text.count("{")
    require(values <= MAX_VALUES, f"JSON of up to {values} values; at most {MAX_VALUES}")
    return json.loads(text, object_pairs_hook=unique)
