"""Images to train on: scikit-learn's 8x8 digits, or a folder in the IDX format of MNIST and its
family.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantize.training.data.reading import DataError, read, sha256


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
            "validation_sha256": sha256(self.validation_images),
        }


def load_images(path: Path | str | None = None) -> ImageData:
    """scikit-learn's digits (1797 images of 8x8, a fifth held out) if `path` is None, else a folder
    of IDX files.

    The folder holds `train-images*`, `train-labels*`, `t10k-images*` (or `test-images*`) and its
    labels, gzipped or not.
    """
    return _digits() if path is None else _idx_folder(Path(path))


def _digits() -> ImageData:
    """Read from the file that scikit-learn carries: importing it takes seconds."""
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise DataError(
            "data: the digits need scikit-learn; install it with `uv sync --extra images`"
        )
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not file.is_file():
        raise DataError(f"data: this scikit-learn has no digits at {file}")
    rows = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    images = rows[:, :64].reshape(-1, 1, 8, 8) / 16
    labels = rows[:, 64].long()
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
    content = read(path)
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
    expected = math.prod(shape)
    if len(values) != expected:
        raise DataError(
            f"data: {path} should hold {expected} values {list(shape)} but holds {len(values)}"
        )
    return values.reshape(shape).copy()
