"""Read a file of data, and say in one line why it can't be used."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor


class DataError(ValueError):
    """Data that cannot be used; the message is one line for the person who gave it."""


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"data: cannot read {path}: {error.strerror or error}") from None


def sha256(values: Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()
