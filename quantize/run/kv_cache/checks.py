"""Arguments of a cache, each refused by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantize.check import is_count

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8)


def per_layer(name: str, value: object, layers: int, *, none: bool = False) -> list:
    values = list(value) if isinstance(value, Sequence) else [value] * layers
    if len(values) != layers or not all(is_count(v) or (none and v is None) for v in values):
        allowed = f"an integer >= 1{' or None' * none}, or {layers} of them"
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")
    return values


def check_dtype(dtype: torch.dtype | None) -> None:
    """One that keys can be kept in; None is that of the keys."""
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(
            f"dtype is {dtype}; allowed: None, float64, float32, float16, bfloat16, int8"
        )


def check_windows(windows: list, limit: int | None) -> None:
    """Without a limit every layer has a window."""
    if limit is None and None in windows:
        raise ValueError(
            "limit is None, which needs a window in every layer: without one the cache "
            "grows forever"
        )


def check_pad(pad: Tensor, batch: int) -> None:
    """One number of empty positions for each row."""
    if pad.shape != (batch,) or pad.dtype != torch.int64 or bool((pad < 0).any()):
        raise ValueError(
            f"pad must be int64 [{batch}] and >= 0, got {pad.dtype} {tuple(pad.shape)}: "
            f"{pad.tolist()}"
        )


def check_layer(index: int, k: Tensor, v: Tensor, shape: tuple[int, int, int, int]) -> None:
    """Keys and values of one layer have the shape [B, KV, T, D] of its cache."""
    if k.shape != shape or v.shape != shape:
        batch, heads, _, width = shape
        raise ValueError(
            f"layer {index}: keys {tuple(k.shape)} and values {tuple(v.shape)} don't fit a "
            f"cache made for {batch} rows, {heads} heads of width {width} (another model or "
            f"batch?)"
        )


def check_new(index: int, new: int, under_way: int) -> None:
    """Each layer gets as many positions as the pass under way has; the first says how many."""
    if new == 0 or (index and new != under_way):
        expected = under_way or "at least 1"
        raise ValueError(f"layer {index} got {new} new positions, where this pass has {expected}")


def check_room(length: int, new: int, limit: int | None) -> None:
    """`new` positions fit behind `length`."""
    if limit is not None and length + new > limit:
        raise ValueError(
            f"{length} positions held + {new} new ones pass the cache's limit of {limit}"
        )


def check_length(length: int, held: int) -> None:
    """A text can be cut to what is held, or less."""
    if not is_count(length, 0) or length > held:
        raise ValueError(f"length is {length!r}; allowed: 0 to the {held} positions held")


def check_copies(batch: int | None, held: int) -> None:
    """A single row can be copied; several keep their number."""
    fits = held == 1 or batch == held
    if batch is not None and not (is_count(batch) and fits):
        more = ", or any if one row is held" * (held == 1)
        raise ValueError(f"batch is {batch!r}; allowed: {held}{more}")
