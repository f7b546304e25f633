"""Write a checkpoint into a container, and read one back with every byte checked.

Each container (pth.py, safetensors.py) has a writer and a function that locates in a file the
record, each tensor's bytes and the digest (the "seal") of everything else. No pickle runs here.
"""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from quantize.atomic import atomic_write
from quantize.checkpoint.contents import DTYPES, MAX_HEADER, SEAL, bytes_of, to_json
from quantize.checkpoint.opening import require
from quantize.checkpoint.pth import locate_pth, write_pth
from quantize.checkpoint.safetensors import locate_safetensors, write_safetensors
from quantize.checkpoint.versions import upgraded

_WRITE = {".pth": write_pth, ".safetensors": write_safetensors}
_LOCATE = {".pth": locate_pth, ".safetensors": locate_safetensors}
_READ_AT_ONCE = 2**20


def write(path: Path, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the file; adds `"tensors"` to the record. The tensors are contiguous, on the CPU, with
    a storage each.
    """
    if path.suffix == ".safetensors":  # its readers want the wide dtypes first, for alignment
        tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    described = {
        name: {
            "dtype": str(t.dtype).removeprefix("torch."),
            "shape": list(t.shape),
            "sha256": _sha256(t),
        }
        for name, t in tensors.items()
    }
    text = to_json(record | {"tensors": described})
    if len(text) > MAX_HEADER // 2:
        raise ValueError(
            f"names, structure and metadata take {len(text)} bytes; at most {MAX_HEADER // 2} fit"
        )
    with atomic_write(path) as file:
        _WRITE[path.suffix](file, text, tensors)
        _, places, seal = _LOCATE[path.suffix](file)
        digest = _digest(file, places, seal)
        file.seek(seal)
        file.write(digest)


def read_header(file: BinaryIO, suffix: str) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    record, places, seal = _LOCATE[suffix](file)
    file.seek(seal)
    require(
        file.read(len(SEAL)) == _digest(file, places, seal),
        "altered: the header's SHA-256 differs",
    )
    return upgraded(record, record.pop("version")), places


def _digest(file: BinaryIO, places: list[tuple[int, int]], seal: int) -> bytes:
    """SHA-256, in hex, of all bytes of the file but the tensors' (which have their own) and the
    digest itself.
    """
    total, end = hashlib.sha256(), 0
    size = file.seek(0, os.SEEK_END)
    for start, stop in sorted([*places, (seal, seal + len(SEAL)), (size, size)]):
        file.seek(end)
        while end < start:
            part = file.read(min(start - end, _READ_AT_ONCE))
            require(part, "truncated")
            total.update(part)
            end += len(part)
        end = stop
    return total.hexdigest().encode()


def _read_into(file: Any, tensor: Tensor) -> int:
    return file.readinto(bytes_of(tensor))


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(bytes_of(tensor)).hexdigest()


def read_tensor(
    file: BinaryIO, start: int, stop: int, *, dtype: str, shape: list[int], sha256: str
) -> Tensor:
    itemsize = DTYPES[dtype].itemsize
    require(
        math.prod(shape) * itemsize == stop - start,
        f"{stop - start} bytes can't be {dtype} of shape {shape}",
    )
    tensor = torch.empty(shape, dtype=DTYPES[dtype])
    file.seek(start)
    require(_read_into(file, tensor) == stop - start, "truncated")
    require(_sha256(tensor) == sha256, f"altered: the SHA-256 of a tensor of shape {shape} differs")
    return tensor
