"""The cache itself: what each layer holds, how it grows, who sees what.

A `KVCache` holds, per layer, one tensor [B, KV, capacity, D] for keys and one for values (int8: and
their scales [B, KV, capacity, 1]); position p of a row lies at index p - `first` of the third axis.
Attention runs over a view of what is held, never over free room. Capacity grows by blocks, at least
by half, up to `limit`. Rows of different length end at the same index: shorter ones have `pad`
empty positions on the left, which nobody sees.

A forward pass writes each layer once, from layer 0 up; `length` advances when the last layer has
written. A pass that fails half-way leaves `length` as it was, and the next one starts over.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantize import check
from quantize.run.kv_cache import checks
from quantize.run.kv_cache.fitting import shape_for
from quantize.run.kv_cache.functions import attention, attention_int8, read, visible
from quantize.run.kv_cache.layer import Layer

BLOCK = 256  # positions; the least by which a cache grows


class KVCache:
    """Keys and values of `layers` attention layers for `batch` rows and at most `limit` positions.

    kv_heads, head_dim: one number, or one per layer (pruned heads). dtype: float16, bfloat16,
    float32, or int8 with a scale per head and position; None follows the keys that arrive. window:
    a query sees only the last `window` positions, itself included (one number, or one or None per
    layer), and what nobody can see is dropped; then `limit` may be None.

    Nothing is allocated before the first `attend`. Gradients don't flow into what is held. Raises
    ValueError, naming the argument, for values out of range; every method leaves the cache usable
    when it raises.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int | Sequence[int],
        head_dim: int | Sequence[int],
        *,
        limit: int | None,
        batch: int = 1,
        dtype: torch.dtype | None = None,
        window: int | Sequence[int | None] | None = None,
        block: int = BLOCK,
    ):
        for name, value in (("layers", layers), ("batch", batch), ("block", block)):
            check.count(name, value)
        if limit is not None:
            check.count("limit", limit)
        checks.check_dtype(dtype)
        windows = checks.per_layer("window", window, layers, none=True)
        checks.check_windows(windows, limit)
        heads = checks.per_layer("kv_heads", kv_heads, layers)
        widths = checks.per_layer("head_dim", head_dim, layers)
        self.batch, self.limit, self.dtype, self.block = batch, limit, dtype, block
        self.length = 0  # positions held, or dropped behind a window; the next one is written here
        self.pad: Tensor | None = None  # int64 [B]: empty positions at the left of each row
        # What `generate` read: int64 [B, length], and a weak reference to the model.
        self.tokens: Tensor | None = None
        self.owner: Callable[[], nn.Module | None] | None = None
        self._layers = list(map(Layer, heads, widths, windows))
        self._new = self._end = 0  # positions of the pass under way, and where it ends
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """KV heads and head width of each layer."""
        return [(layer.kv_heads, layer.head_dim) for layer in self._layers]

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        batch: int = 1,
        limit: int | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> KVCache:
        """A cache that fits `model`: any model whose attention modules have a `cache_shape` (KV
        heads, head width, window).

        `CachedAttention` and the attention of `models.DecoderLM` have one, compressed or not.
        Without a `window` asked for, `limit` defaults to the model's `config.max_length`. `options`
        are those of the constructor.
        """
        shape = shape_for(model, window=options.pop("window", None), limit=limit)
        return cls(**shape, **options, batch=batch, dtype=dtype)

    # Memory.

    def nbytes_at(self, length: int | None = None) -> int:
        """Bytes that `length` positions (default: `limit`) take, by the sizes alone; exact when
        dtype is given.

        A cache grows by blocks, so between two growths it holds somewhat more than
        `nbytes_at(cache.length)`.
        """
        length = self.limit if length is None else length
        total = 0
        for layer in self._layers:
            reach = layer.room(self.block)
            positions = reach if length is None else min(length, reach)
            held = layer.tensors["k"].dtype if layer.tensors else torch.float32
            width = layer.width_bytes(self.dtype or held)
            total += 2 * self.batch * layer.kv_heads * int(positions) * width
        return total

    @property
    def nbytes(self) -> int:
        """Bytes allocated now; tensors shared with a fork count in both."""
        return sum(layer.nbytes() for layer in self._layers)

    # One forward pass.

    def positions(self, new: int, device: torch.device | None = None) -> Tensor:
        """Positions that the next `new` tokens take: int64 [T], or [B, T] for rows of different
        length.

        Read before the pass. Positions of padding are 0.
        """
        slots = torch.arange(self.length, self.length + new, device=device)
        if self.pad is None:
            return slots
        return (slots - self.pad.to(slots.device)[:, None]).clamp_(min=0)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Add k, v [B, KV, T, D] and return causal attention of q [B, H, T, D] over all that is
        visible, [B, H, T, D].
        """
        new = k.shape[2]
        store = self._write(layer, k, v)
        start = self._end - new  # position of the first query
        # The first position that this query sees.
        low = 0 if store.window is None else max(0, start - store.window + 1)
        held = store.between(low, self._end)
        mask = self._mask(store, new, low, q.device)
        if new == 1 and mask is None and store.tensors["k"].dtype == torch.int8:
            return attention_int8(q, held["k"], held["k_scale"], held["v"], held["v_scale"])
        k, v = read(held, "k", q.dtype), read(held, "v", q.dtype)
        return attention(q, k, v, mask, causal=mask is None and new > 1)

    def open(self, new: int, dtype: torch.dtype | None = None) -> list[Layer] | None:
        """What each layer holds, with room for `new` more positions, for whoever writes those
        itself and then calls `close`.

        None before the first pass without a dtype.
        """
        if dtype is None and not all(layer.tensors for layer in self._layers):
            return None
        checks.check_room(self.length, new, self.limit)
        key = torch.empty(self.batch, 0, dtype=dtype, device="cpu")
        for layer in self._layers:
            self._reserve(layer, self.length + new, layer.tensors.get("k", key))
        return self._layers

    def close(self, new: int) -> None:
        """Count `new` positions that were written into what `open` gave."""
        self.length, self._new = self.length + new, 0

    def _write(self, index: int, k: Tensor, v: Tensor) -> Layer:
        if not 0 <= index < len(self._layers):
            raise ValueError(
                f"layer is {index}; the cache has {len(self._layers)} layers: was it made for "
                f"another model?"
            )
        store, new = self._layers[index], k.shape[2]
        checks.check_layer(index, k, v, (self.batch, store.kv_heads, new, store.head_dim))
        checks.check_new(index, new, self._new)
        checks.check_room(self.length, new, self.limit)
        end = self.length + new
        if index == 0:
            self._new = new
            self._masks.clear()
        self._reserve(store, end, k)
        store.write(self.length, k, v)
        self._end = end
        if index == len(self._layers) - 1:
            self.length, self._new = end, 0
        return store

    def _reserve(self, store: Layer, end: int, like: Tensor) -> None:
        dtype = self.dtype or like.dtype
        store.reserve(self.length, end, like, dtype, block=self.block, limit=self.limit)

    # Visibility.

    def _mask(self, store: Layer, new: int, low: int, device: torch.device) -> Tensor | None:
        """bool [T, S] or [B, 1, T, S] over positions low.. of this pass; None: all or causal."""
        start = self._end - new
        window = store.window if store.window is not None and self._end > store.window else None
        if self.pad is None and (new == 1 or (start == 0 and low == 0 and window is None)):
            return None
        key = (low, window)
        if key not in self._masks:
            pad = None if self.pad is None else self.pad.to(device)
            queries = torch.arange(start, self._end, device=device)
            keys = torch.arange(low, self._end, device=device)
            self._masks[key] = visible(queries, keys, window=window, pad=pad)
        return self._masks[key]

    # Rewriting.

    def reset(self, *, batch: int | None = None, pad: Tensor | None = None) -> None:
        """Forget everything, keep the room (unless `batch` changes it). pad: empty positions at the
        left of each row, [B].

        Raises ValueError if `pad` doesn't fit the batch.
        """
        batch = self.batch if batch is None else batch
        check.count("batch", batch)
        if pad is not None:
            checks.check_pad(pad, batch)
            pad = pad if bool(pad.any()) else None
        for layer in self._layers:
            layer.clear(keep_room=batch == self.batch)
        self.batch, self.pad, self.length, self._new = batch, pad, 0, 0
        self.tokens = self.owner = None

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on. Raises ValueError beyond what is held or behind a
        window's memory.
        """
        checks.check_length(length, self.length)
        for layer in self._layers:
            layer.check_holds(length, self.length)
        self.length, self._new = length, 0
        if self.tokens is not None:
            self.tokens = self.tokens[:, :length]

    def fork(self, batch: int | None = None) -> KVCache:
        """A second cache with the same content; with `batch`, that many copies of a single row.

        Nothing is copied until one of the two writes. Raises ValueError for `batch` if this cache
        has several rows.
        """
        checks.check_copies(batch, self.batch)
        twin = copy.copy(self)
        twin._masks, twin._layers = {}, [layer.fork() for layer in self._layers]
        if batch is not None and batch != self.batch:
            twin._map_rows(lambda t: t.expand(batch, *t.shape[1:]), batch)
        return twin

    def _map_rows(self, change: Callable[[Tensor], Tensor], batch: int) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for layer in self._layers:
                layer.map_rows(change)
            if self.pad is not None:
                self.pad = change(self.pad)
            if self.tokens is not None:
                self.tokens = change(self.tokens)
        self.batch, self._new = batch, 0
