"""The rows of a search, in a file that outlives it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quantize.calibration import output_tensors
from quantize.checkpoint import atomic_write

STATE, ORIGINAL = "search.json", "original"
SUFFIX = ".safetensors"

Row = dict[str, Any]


class Points:
    """The rows that were measured, in a file that holds them after any interruption.

    Args:
        folder: of that file and of the models.
        identity: what must be the same for rows to be taken over: model, inputs, calibration.

    `known` has what `keep_known` kept: choices layer by layer rest on times, and a search that goes
    on has to make the same ones. `key` is a digest of the identity, for files.

    Raises:
        ValueError: the folder holds a search of something else.
        OSError: it can't be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, dict(identity)
        self.rows: list[Row] = []
        self.known: dict[str, Any] = {}
        text = json.dumps(self.identity, sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        path = folder / STATE
        if not path.exists():
            self._write()  # from now on the folder is that of this search
        else:
            held = _read(path)
            if held["identity"] != self.identity:
                differing = [k for k, v in self.identity.items() if held["identity"].get(k) != v]
                raise ValueError(
                    f"{path} is of another search (other {', '.join(differing)}): give another out="
                )
            self.rows = [row for row in held["rows"] if self._is_whole(row)]
            self.known = held["known"]

    def find(self, name: str) -> Row | None:
        """The row of that name, if it was measured already."""
        return next((row for row in self.rows if row["name"] == name), None)

    def keep(self, row: Row) -> None:
        """Keep a row, on disk too; one of the same name is replaced."""
        names = [other["name"] for other in self.rows]
        if row["name"] in names:
            self.rows[names.index(row["name"])] = row
        else:
            self.rows.append(row)
        self._write()

    def keep_known(self, name: str, values: Any) -> None:
        """Keep what is known of the model's parts, as JSON values."""
        self.known[name] = values
        self._write()

    def _write(self) -> None:
        content = {"identity": self.identity, "rows": self.rows, "known": self.known}
        with atomic_write(self.folder / STATE) as file:
            file.write(json.dumps(content, indent=1).encode())

    def _is_whole(self, row: Row) -> bool:
        """Is the row's file still what was measured? A point that failed has none."""
        path = self.folder / f"{row['name']}{SUFFIX}"
        return row["file"] is None or (path.is_file() and path.stat().st_size == row["bytes"])


def check_folder(folder: Path) -> None:
    """Raises ValueError for a folder in which is something else than a search."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={folder} exists and is not a folder")
    if (folder / STATE).exists():
        _read(folder / STATE)
    elif folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir()):
        raise ValueError(f"out={folder} isn't empty, and no search wrote it: give another out=")


def _read(path: Path) -> dict[str, Any]:
    """What a search has written down."""
    try:
        held = json.loads(path.read_text())
    except ValueError:
        held = None
    if not isinstance(held, dict) or not held.keys() >= {"identity", "rows", "known"}:
        raise ValueError(f"{path} isn't what a search wrote: give another out=")
    return held


def digest(values: Any) -> str:
    """SHA-256 of the tensors in nested batches."""
    total = hashlib.sha256()
    for tensor in output_tensors(values):
        total.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        numbers = tensor.detach().cpu().contiguous().flatten()
        total.update(numbers.view(torch.uint8).numpy().data)
    return total.hexdigest()
