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


def check_windows(given: object, windows: list, limit: int | None, sinks: int) -> None:
    """Without a limit every layer has a window, and sinks lie within the window."""
    if limit is None and None in windows:
        raise ValueError(
            "limit is None, which needs a window in every layer: without one the cache "
            "grows forever"
        )
    if not is_count(sinks, 0) or (sinks and (None in windows or sinks >= min(windows))):
        raise ValueError(f"sinks is {sinks!r}; allowed: 0, or less than the window ({given!r})")


def check_pad(pad: Tensor, batch: int, sinks: int) -> None:
    """One number of empty positions for each row."""
    if pad.shape != (batch,) or pad.dtype != torch.int64 or bool((pad < 0).any()):
        raise ValueError(
            f"pad must be int64 [{batch}] and >= 0, got {pad.dtype} {tuple(pad.shape)}: "
            f"{pad.tolist()}"
        )
    if sinks:
        raise ValueError(
            "rows of different length can't have sinks: their first positions don't line up"
        )


def check_rows(rows: Tensor, batch: int) -> None:
    """Integers that name rows of the batch."""
    fits = rows.dim() == 1 and not rows.is_floating_point() and len(rows) > 0
    if not fits or rows.min() < 0 or rows.max() >= batch:
        raise ValueError(f"rows is {rows.tolist()}; allowed: integers from 0 to {batch - 1}")


def check_layer(index: int, k: Tensor, v: Tensor, shape: tuple[int, int, int, int]) -> None:
    """Keys and values of one layer have the shape [B, KV, T, D] of its cache."""
    if k.shape != shape or v.shape != shape:
        batch, heads, _, width = shape
        raise ValueError(
            f"layer {index}: keys {tuple(k.shape)} and values {tuple(v.shape)} don't fit a "
            f"cache made for {batch} rows, {heads} heads of width {width} (another model or "
            f"batch?)"
        )


def check_memory(k: Tensor, v: Tensor, mask: Tensor | None, batch: int) -> None:
    """Keys and values of an encoder's output are for `batch` rows, and the mask is for them."""
    masked = mask is None or mask.shape == k.shape[::2]
    if k.shape[0] != batch or k.shape[:3] != v.shape[:3] or not masked:
        raise ValueError(
            f"keys {tuple(k.shape)}, values {tuple(v.shape)} and mask don't fit {batch} rows"
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
