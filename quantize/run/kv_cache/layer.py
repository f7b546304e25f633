"""What one attention layer keeps in a cache, and how it makes room: reuse, drop what a window left
behind, or grow.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

from quantize.run.kv_cache.functions import quantize_rows

SLACK = 64  # positions kept behind a sliding window, so that a speculative pass can be taken back


class Layer:
    """Tensors by name, [B, KV, capacity, ...]; index 0 of the third axis is position `first`."""

    def __init__(self, kv_heads: int, head_dim: int, window: int | None):
        self.kv_heads, self.head_dim, self.window = kv_heads, head_dim, window
        self.tensors: dict[str, Tensor] = {}  # k, v; int8: k_scale, v_scale too
        self.first = 0
        # how many caches use these tensors; a list, because they share the count as well
        self.sharers = [1]

    @property
    def capacity(self) -> int:
        return self.tensors["k"].shape[2] if self.tensors else 0

    @property
    def writable(self) -> bool:
        """Whether the tensors are this layer's alone, and not copies of one row that share its
        memory.
        """
        whole = all(tensor.is_contiguous() for tensor in self.tensors.values())
        return bool(self.tensors) and self.sharers[0] == 1 and whole

    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())

    def width_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the key of one head and position."""
        scale = torch.bfloat16.itemsize if dtype == torch.int8 else 0
        return self.head_dim * dtype.itemsize + scale

    def room(self, block: int) -> float:
        """Capacity beyond which a windowed layer drops positions instead of growing."""
        return math.inf if self.window is None else self.window + SLACK + block

    # ------------------------------------------------------------------------------------------
    # sharing

    def fork(self) -> Layer:
        """A layer with the same tensors, which neither writes into from now on."""
        self.sharers[0] += 1
        twin = copy.copy(self)
        twin.tensors = dict(self.tensors)
        return twin

    def stop_sharing(self) -> None:
        """The tensors are this layer's own from here on."""
        self.sharers[0] -= 1
        self.sharers = [1]

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.tensors.update({name: change(tensor) for name, tensor in self.tensors.items()})

    def clear(self, *, keep_room: bool) -> None:
        """Forget everything; the tensors stay as room to write into, unless others use them."""
        if not keep_room or self.sharers[0] > 1:
            self.stop_sharing()
            self.tensors = {}
        self.first = 0

    # ------------------------------------------------------------------------------------------
    # writing

    def write(self, start: int, k: Tensor, v: Tensor) -> None:
        """Put k, v [B, KV, T, D] at positions start.., for which room was made."""
        at = slice(start - self.first, start - self.first + k.shape[2])
        for name, x in (("k", k.detach()), ("v", v.detach())):
            if self.tensors["k"].dtype == torch.int8:
                values, scale = quantize_rows(x)
                self.tensors[name][:, :, at] = values
                self.tensors[f"{name}_scale"][:, :, at] = scale
            else:
                self.tensors[name][:, :, at] = x

    def check_holds(self, length: int, held: int) -> None:
        """ValueError if a text cut to `length` positions, of `held`, would see what was dropped."""
        least = self.first + (self.window or 0) - 1
        if self.first and length < least:
            raise ValueError(
                f"length is {length}; a window of {self.window} allows {least} to {held} by now"
            )

    def between(self, low: int, end: int) -> dict[str, Tensor]:
        """Views of what is held for positions low..end."""
        return {
            name: t[:, :, low - self.first : end - self.first] for name, t in self.tensors.items()
        }

    def reserve(
        self,
        length: int,
        end: int,
        like: Tensor,
        dtype: torch.dtype,
        *,
        block: int,
        limit: int | None,
    ) -> None:
        """Make room for positions up to `end`, where `length` are held.

        Args:
            length, end: positions held so far, and how many will be.
            like: a key [B, KV, T, D] that arrives; its batch and device are those of new tensors.
            dtype: of new tensors, if there are none yet.
            block, limit: those of the cache.
        """
        if self.writable and end - self.first <= self.capacity:
            return
        drop = self._droppable(length, end, block)
        needed, held = end - self.first - drop, length - self.first - drop
        if self.writable and needed <= self.capacity:
            self._move(drop, held, self.tensors)
        else:
            most = math.inf if limit is None else limit - self.first - drop
            self._move(drop, held, self._empty(self._size(needed, block, most), like, dtype))
        if self.sharers[0] > 1:
            self.stop_sharing()
        self.first += drop

    def _droppable(self, length: int, end: int, block: int) -> int:
        """Positions at the start that a window has left behind, if it is time to drop them."""
        if self.window is None or end - self.first <= self.room(block):
            return 0
        return max(0, length - self.first - self.window - SLACK)

    def _size(self, needed: int, block: int, most: float) -> int:
        """Capacity to grow to: by half at least, so that copying stays linear in the final
        length.
        """
        size = max(needed, self.capacity * 3 // 2)
        size = -(-size // block) * block
        return max(needed, int(min(size, most, self.room(block))))

    @torch.inference_mode(False)  # usable in and out of inference mode
    def _empty(self, size: int, like: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        dtype = self.tensors["k"].dtype if self.tensors else dtype
        shape = (like.shape[0], self.kv_heads, size)
        widths = {"k": (self.head_dim, dtype), "v": (self.head_dim, dtype)}
        if dtype == torch.int8:
            widths |= {"k_scale": (1, torch.bfloat16), "v_scale": (1, torch.bfloat16)}
        return {
            n: torch.empty(*shape, width, dtype=kind, device=like.device)
            for n, (width, kind) in widths.items()
        }

    @torch.inference_mode(False)
    @torch.no_grad()
    def _move(self, drop: int, held: int, room: dict[str, Tensor]) -> None:
        """Put what is held, but for the first `drop` positions, at the start of `room`."""
        for name, old in self.tensors.items():
            kept = old[:, :, drop : drop + held]
            room[name][:, :, :held] = kept.clone() if room[name] is old else kept
        self.tensors = room
