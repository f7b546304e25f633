"""The datatypes of the Open Inference Protocol, and tensors to and from their two forms: JSON
numbers, and bytes of little-endian numbers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantize.run.serve.errors import Refused, short

DTYPES = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "BF16": torch.bfloat16,
    "FP32": torch.float32,
    "FP64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HALVES = (torch.float16, torch.bfloat16)
MOST_AXES = 8


def check_shape(name: str, shape: Any) -> list[int]:
    """The shape that a request names. Raises Refused for anything but a list of sizes."""
    whole = isinstance(shape, list) and 0 < len(shape) <= MOST_AXES
    if not whole or not all(type(size) is int and size > 0 for size in shape):
        raise Refused(f"input {name!r}: shape is {short(shape)}; allowed: 1 to {MOST_AXES} sizes")
    return shape


def from_json(name: str, data: object, shape: Sequence[int], datatype: str) -> Tensor:
    """The tensor of a list of numbers, flat or nested in rows.

    Raises:
        Refused: naming the input; numbers of another count or kind, or out of the datatype's range.
    """
    dtype = DTYPES[datatype]
    wide = np.dtype(np.float64 if dtype.is_floating_point else np.int64)
    try:
        given = np.asarray(data)
        if given.dtype.kind not in _kinds(dtype):
            raise ValueError
        numbers = given.astype(wide, casting="safe")  # none that it can't hold
    except (ValueError, OverflowError, TypeError):
        raise Refused(f"input {name!r}: data isn't a list of {datatype} numbers") from None
    if numbers.size != math.prod(shape):
        raise Refused(
            f"input {name!r}: {numbers.size} numbers for shape {list(shape)}, which holds "
            f"{math.prod(shape)}"
        )
    held = torch.from_numpy(numbers.reshape(shape))
    _check_range(name, held, dtype, datatype)
    return _finite(name, held.to(dtype))


def _kinds(dtype: torch.dtype) -> str:
    """The kinds of numpy's numbers that a datatype takes."""
    if dtype is torch.bool:
        return "b"
    return "iuf" if dtype.is_floating_point else "iu"


def _check_range(name: str, numbers: Tensor, dtype: torch.dtype, datatype: str) -> None:
    if dtype is torch.bool or dtype.is_floating_point:
        return
    limits = torch.iinfo(dtype)
    low, high = int(numbers.min()), int(numbers.max())
    if low < limits.min or high > limits.max:
        wrong = low if low < limits.min else high
        raise Refused(
            f"input {name!r}: {wrong} isn't {datatype}; allowed: {limits.min} to {limits.max}"
        )


def from_bytes(name: str, data: memoryview, shape: Sequence[int], datatype: str) -> Tensor:
    """The tensor of little-endian bytes, copied. Raises Refused for another count of bytes."""
    dtype = DTYPES[datatype]
    needed = math.prod(shape) * dtype.itemsize
    if len(data) != needed:
        raise Refused(
            f"input {name!r}: {len(data)} bytes for {datatype} {list(shape)}, which takes {needed}"
        )
    if dtype is torch.bool and bytes(data).translate(None, b"\0\1"):
        raise Refused(f"input {name!r}: a byte of BOOL is neither 0 nor 1")
    held = torch.frombuffer(bytearray(_little_endian(data, dtype)), dtype=dtype)
    return _finite(name, held.reshape(list(shape)))


def to_bytes(tensor: Tensor) -> bytes:
    """Little-endian bytes of a tensor."""
    given = tensor.detach()
    whole = given.view(torch.int16) if given.dtype is torch.bfloat16 else given
    return bytes(_little_endian(whole.numpy(force=True).tobytes(), tensor.dtype))


def to_json(name: str, tensor: Tensor) -> np.ndarray:
    """A tensor's numbers, flat. Raises Refused where JSON has no such number."""
    flat = tensor.detach().cpu().flatten()
    numbers = (flat.float() if flat.dtype in HALVES else flat).numpy()
    if not np.isfinite(numbers).all():
        raise Refused(
            f"output {name!r} holds NaN or infinity, which JSON can't: ask for binary data",
            status=500,
        )
    return numbers


def _finite(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() and not _is_finite(tensor):
        raise Refused(f"input {name!r} holds NaN or infinity")
    return tensor


def _is_finite(tensor: Tensor) -> bool:
    if tensor.dtype is torch.bfloat16:
        return bool(torch.isfinite(tensor).all())
    return bool(np.isfinite(tensor.numpy()).all())  # takes a tenth of the time for a few numbers


def _little_endian(data: bytes | memoryview, dtype: torch.dtype) -> bytes | memoryview:
    if sys.byteorder == "little":
        return data
    numbers = np.frombuffer(data, dtype=f"u{dtype.itemsize}")
    return numbers.byteswap().tobytes()
