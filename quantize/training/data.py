"""The data that the scripts train on: text as bytes, images as floats.

Text comes from the Python standard library that runs the script (its sources and the prose of its
help system: real, about 11 MB, on every machine) or from the reader's own files. Whole files are
held out for validation. Images are scikit-learn's 8x8 digits or any folder in the IDX format of
MNIST and its family. Left out: tokenizers (a byte is a token), downloading, anything larger than
memory.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import struct
import sysconfig
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HELD_OUT = 0.04  # share of the text's bytes that validation may take
_NOT_SOURCES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class DataError(ValueError):
    """Data that cannot be used; the message is one line for the person who gave it."""


# -------------------------------------------------------------------------------------------------
# text


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
            "train_sha256": _sha256(self.train),
            "validation_bytes": len(self.validation),
            "validation_files": list(self.validation_files),
            "validation_sha256": _sha256(self.validation),
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
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not _NOT_SOURCES.intersection(parts) and parts != ("pydoc_data", "topics.py"):
            content = _read(path)
            if content:
                documents["/".join(parts)] = content
    return documents


def _read_all(paths: Sequence[Path]) -> dict[str, bytes]:
    if not paths:
        raise DataError("data: no file or folder was given")
    documents: dict[str, bytes] = {}
    for path in paths:
        if path.is_dir():
            found = {
                f"{path.name}/{file.relative_to(path).as_posix()}": _read(file)
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
            content = _read(path)
            if not content:
                raise DataError(f"data: file {path} is empty")
            if b"\0" in content:
                raise DataError(f"data: file {path} is not text (it holds NUL bytes)")
            found = {path.name: content}
        for name, content in found.items():
            documents[name if name not in documents else f"{path}:{name}"] = content
    return dict(sorted(documents.items()))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"data: cannot read {path}: {error.strerror or error}") from None


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


def _sha256(values: Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


class TextBatches:
    """Training windows as a pure function of the step: `batches(step) -> (ids, next ids)`, int64
    [B, T] each.

    Nothing is remembered between steps, so training resumes at any of them. Each pass visits all
    windows of the text in an order drawn from the seed, cut from a shifted start. `batch` is what
    one rank sees; the ranks of one step share out the windows that a single rank with `batch *
    world` would see.

    The first `short_steps` steps see twice as many windows of half the length: more different text
    for the same work, while the model still learns what is near.
    """

    def __init__(
        self,
        text: Tensor,
        *,
        batch: int,
        length: int,
        short_steps: int = 0,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        if batch < 1 or length < 1:
            raise ValueError(f"batch={batch}, length={length}: both must be >= 1")
        if len(text) <= 2 * length:
            raise DataError(
                f"data: {len(text)} bytes to train on are too few for windows of {length} bytes"
            )
        self.text, self.length, self.short_steps = text, length, short_steps
        # of the windows that fit, one is left out: room to shift
        self._rows = _Rows((len(text) - 1) // length - 1, batch, seed, rank, world)
        if short_steps > 0:
            self._short = TextBatches(
                text,
                batch=2 * batch,
                length=max(1, length // 2),
                seed=seed + 1,
                rank=rank,
                world=world,
            )

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        if step < self.short_steps:
            return self._short(step)
        starts = [place * self.length + shift % self.length for place, shift in self._rows(step)]
        rows = torch.stack([self.text[start : start + self.length + 1] for start in starts]).long()
        return rows[:, :-1], rows[:, 1:]


class ImageBatches:
    """Training images as a pure function of the step: `batches(step) -> (images, labels)`; see
    `TextBatches`.
    """

    def __init__(
        self, data: ImageData, *, batch: int, seed: int = 0, rank: int = 0, world: int = 1
    ):
        if batch < 1:
            raise ValueError(f"batch={batch} must be >= 1")
        self.images, self.labels = data.train_images, data.train_labels
        self._rows = _Rows(len(self.labels), batch, seed, rank, world)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        rows = torch.tensor([place for place, _ in self._rows(step)])
        return self.images[rows], self.labels[rows]


class _Rows:
    """Which of `count` samples make up a step, with a number drawn per pass, for shifting."""

    def __init__(self, count: int, batch: int, seed: int, rank: int, world: int):
        self.count, self.batch, self.seed, self.rank, self.world = count, batch, seed, rank, world
        self._order: tuple[int, np.ndarray, int] = (-1, np.empty(0, dtype=np.int64), 0)

    def __call__(self, step: int) -> list[tuple[int, int]]:
        first = (step * self.world + self.rank) * self.batch
        return [self._sample(first + row) for row in range(self.batch)]

    def _sample(self, index: int) -> tuple[int, int]:
        epoch, place = divmod(index, self.count)
        if self._order[0] != epoch:  # a memo of a pure function, not state
            random = np.random.default_rng((self.seed, epoch))
            self._order = (epoch, random.permutation(self.count), int(random.integers(2**31)))
        return int(self._order[1][place]), self._order[2]


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


# -----------------------------------------------------------------------------------------------
# images


@dataclass(frozen=True)
class ImageData:
    """Images fp32 [N, C, H, W] in 0..1 and their classes int64 [N], to train on and held out."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    classes: int
    task: str = "image"

    def describe(self) -> dict:
        """What the report says about the data."""
        return {
            "task": self.task,
            "name": self.name,
            "image_shape": list(self.train_images.shape[1:]),
            "classes": self.classes,
            "train_images": len(self.train_images),
            "validation_images": len(self.validation_images),
            "validation_sha256": _sha256(self.validation_images),
        }


def load_images(path: Path | str | None = None) -> ImageData:
    """scikit-learn's digits (1797 images of 8x8, a fifth held out) if `path` is None, else a folder
    of IDX files.

    The folder holds `train-images*`, `train-labels*`, `t10k-images*` (or `test-images*`) and its
    labels, gzipped or not.
    """
    return _digits() if path is None else _idx_folder(Path(path))


def _digits() -> ImageData:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "data: the digits need scikit-learn; install it with `uv sync --extra images`"
        ) from None
    digits: Any = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    labels = torch.from_numpy(digits.target).long()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    held, rest = order[: len(order) // 5], order[len(order) // 5 :]
    return ImageData(
        "scikit-learn digits", images[rest], labels[rest], images[held], labels[held], classes=10
    )


def _idx_folder(folder: Path) -> ImageData:
    if not folder.is_dir():
        raise DataError(f"data: {folder} is not a folder of IDX files")
    train, train_labels = _idx_pair(folder, ("train",))
    validation, validation_labels = _idx_pair(folder, ("t10k", "test"))
    if train.shape[1:] != validation.shape[1:]:
        raise DataError(
            f"data: {folder}: train images are {train.shape[1:]}, test images "
            f"{validation.shape[1:]}"
        )
    classes = int(max(train_labels.max(), validation_labels.max())) + 1
    return ImageData(folder.name, train, train_labels, validation, validation_labels, classes)


def _idx_pair(folder: Path, prefixes: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    images, labels = (_find(folder, prefixes, kind) for kind in ("images", "labels"))
    pixels, classes = read_idx(images), read_idx(labels)
    if (
        pixels.ndim not in (3, 4)
        or classes.ndim != 1
        or len(pixels) != len(classes)
        or not len(classes)
    ):
        raise DataError(
            f"data: {images.name} has shape {list(pixels.shape)} and {labels.name} "
            f"{list(classes.shape)}; "
            "need [N, H, W] or [N, C, H, W], and [N], N >= 1"
        )
    pixels = pixels if pixels.ndim == 4 else pixels[:, None]
    return torch.from_numpy(pixels).float() / 255, torch.from_numpy(classes).long()


def _find(folder: Path, prefixes: tuple[str, ...], kind: str) -> Path:
    for prefix in prefixes:
        found = sorted(path for path in folder.glob(f"{prefix}*{kind}*") if path.is_file())
        if found:
            return found[0]
    raise DataError(f"data: folder {folder} holds no file named {' or '.join(prefixes)}-{kind}*")


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped or not (http://yann.lecun.com/exdb/mnist, "the
    IDX file format").
    """
    content = _read(path)
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"data: {path} is a damaged gzip file: {error}") from None
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise DataError(f"data: {path} is not an IDX file of unsigned bytes")
    dims = content[3]
    if not 1 <= dims <= 4 or len(content) < 4 + 4 * dims:
        raise DataError(f"data: {path} has a damaged IDX header")
    shape = struct.unpack(f">{dims}I", content[4 : 4 + 4 * dims])
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dims)
    expected = 1
    for size in shape:
        expected *= size
    if len(values) != expected:
        raise DataError(
            f"data: {path} should hold {expected} values {list(shape)} but holds {len(values)}"
        )
    return values.reshape(shape).copy()
