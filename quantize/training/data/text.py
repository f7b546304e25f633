"""Text to train on, as bytes.

It comes from the Python standard library that runs the script (its sources and the prose of its
help system: real, about 11 MB, on every machine) or from the reader's own files. Whole files are
held out for validation.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantize.training.data.reading import DataError, read, sha256

HELD_OUT = 0.04  # share of the text's bytes that validation may take
_NOT_SOURCES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class TextData:
    """Bytes to train on and bytes held out, each a 1-D uint8 tensor; ids are the byte values, 0 to
    255.
    """

    name: str
    train: Tensor
    validation: Tensor
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]
    task: str = "text"

    def describe(self) -> dict:
        """What the report says about the data: sizes in bytes, file counts, hashes, the names held
        out.
        """
        return {
            "task": self.task,
            "name": self.name,
            "train_bytes": len(self.train),
            "train_files": len(self.train_files),
            "train_sha256": sha256(self.train),
            "validation_bytes": len(self.validation),
            "validation_files": list(self.validation_files),
            "validation_sha256": sha256(self.validation),
        }


def load_text(paths: Sequence[Path | str] | None = None) -> TextData:
    """Read and split text: the standard library if `paths` is None, else the files and folders
    named.

    The order is by name and the split by a hash of the name, so both are the same on every machine.
    No file is cut in two, except when there is only one: then its last lines are held out.
    """
    documents = _standard_library() if paths is None else _read_all([Path(path) for path in paths])
    name = (
        f"Python {sysconfig.get_python_version()} standard library"
        if paths is None
        else ", ".join(map(str, paths))
    )
    if len(documents) == 1:
        documents = _cut(*next(iter(documents.items())))
    held_out = _choose_held_out({name: len(content) for name, content in documents.items()})
    train = [name for name in documents if name not in held_out]
    validation = [name for name in documents if name in held_out]
    return TextData(
        name,
        _as_tensor(b"".join(documents[name] for name in train)),
        _as_tensor(b"".join(documents[name] for name in validation)),
        tuple(train),
        tuple(validation),
    )


def _standard_library() -> dict[str, bytes]:
    from pydoc_data.topics import topics  # 0.5 MB of prose; only who trains on it pays for it

    # One document: the topics repeat each other's paragraphs, so no part of them may be held out
    # from the rest.
    documents = {
        "pydoc_data.topics": "\n\n".join(f"{key}\n{topics[key]}" for key in sorted(topics)).encode()
    }
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(_sources(root)):
        name = path.relative_to(root).as_posix()
        content = read(path)
        if content and name != "pydoc_data/topics.py":
            documents[name] = content
    return documents


def _sources(root: Path) -> Iterator[Path]:
    """The Python files below `root`; folders of `_NOT_SOURCES`, which hold most, aren't entered."""
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in _NOT_SOURCES]
        for name in files:
            if name.endswith(".py"):
                yield Path(folder, name)


def _read_all(paths: Sequence[Path]) -> dict[str, bytes]:
    if not paths:
        raise DataError("data: no file or folder was given")
    documents: dict[str, bytes] = {}
    for path in paths:
        if path.is_dir():
            found = {
                f"{path.name}/{file.relative_to(path).as_posix()}": read(file)
                for file in sorted(path.rglob("*"))
                if file.is_file()
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
            }
            found = {
                name: content for name, content in found.items() if content and b"\0" not in content
            }
            if not found:
                raise DataError(
                    f"data: folder {path} holds no usable file (a non-empty one without NUL bytes)"
                )
        else:
            content = read(path)
            if not content:
                raise DataError(f"data: file {path} is empty")
            if b"\0" in content:
                raise DataError(f"data: file {path} is not text (it holds NUL bytes)")
            found = {path.name: content}
        for name, content in found.items():
            documents[name if name not in documents else f"{path}:{name}"] = content
    return dict(sorted(documents.items()))


def _cut(name: str, content: bytes) -> dict[str, bytes]:
    """Split one document at the line nearest before its last 4%."""
    at = len(content) - max(1, int(HELD_OUT * len(content)))
    at = content.rfind(b"\n", 1, at) + 1 or at
    if at < 1:
        raise DataError(f"data: {name} is too short to hold any of it out ({len(content)} byte)")
    return {f"{name} (first part)": content[:at], f"{name} (last part)": content[at:]}


def _choose_held_out(sizes: dict[str, int]) -> set[str]:
    """Names that fit into 4% of all bytes, taken in the order of their hash; at least one, the
    smallest.
    """
    room = HELD_OUT * sum(sizes.values())
    chosen = set()
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sizes[name] <= room:
            chosen.add(name)
            room -= sizes[name]
    return chosen or {min(sizes, key=sizes.__getitem__)}


def _as_tensor(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())


def compression_baselines(content: bytes | Tensor) -> dict[str, float]:
    """Bits per byte of gzip -9 and xz -9e on the same bytes, what a language model of them should
    beat.
    """
    content = content if isinstance(content, bytes) else content.numpy().tobytes()
    if not content:
        raise DataError("data: no bytes to compress")
    packed = {
        "gzip -9": gzip.compress(content, 9, mtime=0),
        "xz -9e": lzma.compress(content, preset=9 | lzma.PRESET_EXTREME),
    }
    return {name: 8 * len(result) / len(content) for name, result in packed.items()}
