"""Batches of what a model reads, from what people have: text files, folders of images, arrays.

Text goes through the tokenizer beside the model, images are cropped and scaled as its
preprocessor_config.json says. Left out: labels, which only `evaluate` needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from quantize.measuring.command import read_arrays
from quantize.models.published import read_json
from quantize.run.generate.text import Text
from quantize.training.data.reading import DataError

ARRAYS = (".npz", ".npy", ".safetensors")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
BYTES = 256  # a vocabulary of so many ids, or fewer, reads bytes
MOST_TEXT = 32 << 20  # bytes that are read of all text files


def read_samples(
    paths: Sequence[Path],
    model: nn.Module,
    source: Path,
    *,
    batch: int = 8,
    batches: int = 32,
    length: int | None = None,
    image_size: int | None = None,
) -> list[Any]:
    """Batches as `quantize.compress` takes them.

    Args:
        paths: files and folders of one kind: text; images; or .npz, .npy, .safetensors, whose
            arrays are named as the arguments of `forward` and have the examples along their first
            axis.
        model: what reads them.
        source: where it came from: a folder may have its tokenizer and its preprocessor.
        batch: examples in each; what is left over is dropped.
        batches: how many of them at most.
        length: tokens in each example of text; None: 128, or what the model takes at most.
        image_size: height and width; None: what the folder or the config says.

    Returns:
        At least one batch: a tensor, or a dict of keyword arguments.

    Raises:
        DataError: naming the path: files that aren't there, can't be read, are too few, or don't
            fit the model.
        ValueError: no tokenizer for the text.
    """
    files = _files(paths)
    if all(file.suffix.lower() in ARRAYS for file in files):
        examples: Any = _arrays(files)
    elif all(file.suffix.lower() in IMAGES for file in files):
        size = image_size or _image_size(model, source)
        pixels = _images(files[: batch * batches], source, size, _mode(model))
        examples = _named(model, "pixel_values", pixels)
    else:
        count = length or min(128, _longest(model))
        windows = _windows(files, tokenizer_of(model, source), count, batch * batches)
        examples = _named(model, "input_ids", windows)
    return _batches(examples, batch, batches, files[0])


def tokenizer_of(model: nn.Module, source: Path) -> Text:
    """What turns text into the ids that the model reads: the folder's tokenizer, or bytes.

    Raises:
        ValueError: the folder has none, and the vocabulary isn't bytes.
    """
    folder = source if source.is_dir() else source.parent
    if (folder / "tokenizer.json").is_file():
        return Text(folder)
    vocabulary = max((m.num_embeddings for m in _embeddings(model)), default=BYTES)
    if vocabulary > BYTES:
        raise ValueError(
            f"{folder} has no tokenizer.json, and a vocabulary of {vocabulary} isn't bytes: put "
            f"the tokenizer beside the model, or give arrays of ids"
        )
    return Text()


def _embeddings(model: nn.Module) -> list[nn.Embedding]:
    return [module for module in model.modules() if isinstance(module, nn.Embedding)]


def _files(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.is_file()]
            found += [file for file in inside if not file.name.startswith(".")]
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"data: {path}: no such file or folder")
    if not found:
        raise DataError(f"data: {', '.join(map(str, paths))}: no file is there")
    kinds = {_kind(file) for file in found}
    if len(kinds) > 1:
        raise DataError(f"data: {' and '.join(sorted(kinds))} together: give one kind")
    return found


def _kind(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix in ARRAYS:
        return "arrays"
    return "images" if suffix in IMAGES else "text"


# Arrays.


def _arrays(files: Sequence[Path]) -> Any:
    """The arrays of one file: a tensor, or a dict of them by name."""
    if len(files) > 1:
        raise DataError(f"data: {len(files)} files of arrays: give one")
    file = files[0]
    try:
        found = read_arrays(file)
    except Exception as error:  # numpy and safetensors raise a dozen kinds
        raise DataError(f"data: {file} can't be read: {error}") from error
    sizes = {name: list(array.shape[:1]) for name, array in found.items()}
    if len(set(map(tuple, sizes.values()))) != 1 or [] in sizes.values():
        raise DataError(f"data: {file}: its arrays have the first axes {sizes}: one is allowed")
    return found if set(found) != {"x"} else found["x"]


# Images.


def _image_size(model: Any, source: Path) -> int:
    size = _preprocessing(source).get("crop_size") or _preprocessing(source).get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    size = size or getattr(getattr(model, "config", None), "image_size", None)
    if not isinstance(size, int) or not 0 < size < 1 << 14:
        raise DataError("data: no image size is known of this model: give --image-size")
    return size


def _preprocessing(source: Path) -> dict[str, Any]:
    file = source / "preprocessor_config.json"
    return read_json(file) if file.is_file() else {}


def _mode(model: nn.Module) -> str:
    """Of the images: grey for a model whose first convolution reads one channel."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return "L" if module.in_channels == 1 else "RGB"
    return "RGB"


def _images(files: Sequence[Path], source: Path, size: int, mode: str) -> Tensor:
    """[N, C, size, size]: the middle of each, scaled to [0, 1], then to the folder's mean and
    deviation.
    """
    settings = _preprocessing(source)
    mean = torch.tensor(settings.get("image_mean") or [0.0]).view(-1, 1, 1)
    deviation = torch.tensor(settings.get("image_std") or [1.0]).view(-1, 1, 1)
    pixels = torch.stack([_pixels(file, size, mode) for file in files])
    return (pixels - mean) / deviation


def _pixels(file: Path, size: int, mode: str) -> Tensor:
    try:
        with Image.open(file) as image:
            picture = image.convert(mode)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"data: {file} can't be read: {error}") from error
    scale = size / min(picture.size)
    width, height = (max(size, round(scale * side)) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    scaled = picture.resize((width, height), Image.Resampling.BILINEAR)
    middle = scaled.crop((left, top, left + size, top + size))
    values = np.array(middle).reshape(size, size, -1)
    return torch.from_numpy(values).permute(2, 0, 1).float() / 255


# Text.


def _longest(model: Any) -> int:
    config = getattr(model, "config", None)
    names = ("max_position_embeddings", "n_positions", "max_length")
    limits = [getattr(config, name, None) for name in names]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=128)


def _windows(files: Sequence[Path], text: Text, length: int, most: int) -> Tensor:
    """[N, length] ids; each window is whole, with the tokenizer's special tokens where it has
    some.
    """
    if length < 2:
        raise DataError(f"data: --length is {length}; at least 2 tokens are needed")
    cut = _cutter(text, length)
    windows: list[list[int]] = []
    left = MOST_TEXT
    for file in files:
        with file.open("rb") as opened:
            content = opened.read(left)
        left -= len(content)
        if b"\0" in content:
            raise DataError(f"data: {file} is no text: it has NUL bytes")
        windows += cut(content.decode(errors="replace"))
        if len(windows) >= most or left <= 0:
            break
    if not windows:
        raise DataError(f"data: no file has {length} tokens: give more text, or a smaller --length")
    return torch.tensor(windows[:most], dtype=torch.int64)


def _cutter(text: Text, length: int) -> Callable[[str], list[list[int]]]:
    tokenizer: Any = text.tokenizer

    def pieces(content: str) -> list[list[int]]:
        if tokenizer is None:
            ids = text.encode(content)
            windows = [ids[start : start + length] for start in range(0, len(ids), length)]
        else:
            first = tokenizer.encode(content)
            windows = [part.ids for part in (first, *first.overflowing)]
        return [window for window in windows if len(window) == length]

    if tokenizer is not None:
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length=length)
    return pieces


# Batches.


def _named(model: Any, name: str, tensor: Tensor) -> Any:
    """The tensor as the argument of that name where `forward` has one, else as its first."""
    known = inspect.signature(model.forward).parameters
    return {name: tensor} if name in known else tensor


def _batches(examples: Any, batch: int, batches: int, file: Path) -> list[Any]:
    named = examples if isinstance(examples, dict) else {"": examples}
    count = min(len(tensor) for tensor in named.values())
    if count < batch:
        raise DataError(f"data: {file}: {count} examples are fewer than a batch of {batch}")
    found = []
    for start in range(0, min(count, batch * batches) - batch + 1, batch):
        part = {name: tensor[start : start + batch].clone() for name, tensor in named.items()}
        found.append(part if isinstance(examples, dict) else part[""])
    return found
