"""The cache itself: what each layer holds, how it grows, who sees what.

A `KVCache` holds, per layer, one tensor [B, KV, capacity, D] for keys and one for values (int8: and
their scales [B, KV, capacity, 1]); position p of a row lies at index p - `first` of the third axis.
Attention runs over a view of what is held, never over free room. Capacity grows by blocks, at least
by half, up to `limit`. Rows of different length end at the same
index: shorter ones have `pad` empty positions on the left, which nobody sees.

A forward pass writes each layer once, from layer 0 up; `length` advances when the last layer has
written. A pass that fails half-way leaves `length` as it was, and the next one starts over.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantize.run.kv_cache.functions import (
    alibi_bias,
    attention,
    attention_int8,
    attention_with_sinks,
    is_count,
    per_layer,
)
from quantize.run.kv_cache.layer import Layer

BLOCK = 256  # positions; the least by which a cache grows


class KVCache:
    """Keys and values of `layers` attention layers for `batch` rows and at most `limit` positions.

    kv_heads, head_dim: one number, or one per layer (pruned heads). dtype: float16, bfloat16,
    float32, or int8 with a scale per head and position; None follows the keys that arrive. window:
    a query sees only the last `window` positions, itself included (one number, or one or None per
    layer), and what nobody can see is dropped; then `limit` may be None. sinks: positions at the
    start that stay visible beyond the window (Xiao et al., arXiv 2309.17453); `rope` are then the
    model's rotary frequencies [D/2], so that a sink never seems farther away than the window
    reaches.

    Nothing is allocated before the first `update`. Gradients don't flow into what is held. Raises
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
        sinks: int = 0,
        rope: Tensor | None = None,
        block: int = BLOCK,
    ):
        for name, value in (
            ("layers", layers),
            ("batch", batch),
            ("block", block),
            ("limit", limit),
        ):
            if not is_count(value, 1) and not (name == "limit" and value is None):
                raise ValueError(f"{name} is {value!r}; allowed: an integer >= 1")
        if dtype not in (
            None,
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.int8,
        ):
            raise ValueError(
                f"dtype is {dtype}; allowed: None, float64, float32, float16, bfloat16, int8"
            )
        windows = per_layer("window", window, layers, none=True)
        if limit is None and None in windows:
            raise ValueError(
                "limit is None, which needs a window in every layer: without one the cache "
                "grows forever"
            )
        if not is_count(sinks, 0) or (sinks and (None in windows or sinks >= min(windows))):
            raise ValueError(
                f"sinks is {sinks!r}; allowed: 0, or less than the window ({window!r})"
            )
        shapes = zip(
            per_layer("kv_heads", kv_heads, layers),
            per_layer("head_dim", head_dim, layers),
            windows,
            strict=True,
        )
        self.batch, self.limit, self.dtype, self.block = batch, limit, dtype, block
        self.sinks, self.rope = sinks, rope
        self.length = 0  # positions held, or dropped behind a window; the next one is written here
        self.pad: Tensor | None = None  # int64 [B]: empty positions at the left of each row
        self.tokens: Tensor | None = (
            None  # int64 [B, length] and a weak reference to the model: what `generate` read
        )
        self.owner: Callable[[], nn.Module | None] | None = None
        self._layers = [Layer(*shape) for shape in shapes]
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
        modules: list[Any] = [m for m in model.modules() if hasattr(m, "cache_shape")]
        modules.sort(key=lambda m: m.layer)
        if not modules or [m.layer for m in modules] != list(range(len(modules))):
            found = f"found layers {[m.layer for m in modules]}"
            raise ValueError(
                f"{type(model).__name__} has no attention layers 0, 1, ... with a "
                f"`cache_shape`: {found}"
            )
        heads, widths, windows = (
            list(column) for column in zip(*(m.cache_shape for m in modules), strict=True)
        )
        asked = per_layer("window", options.pop("window", None), len(modules), none=True)
        if limit is None and None in asked:
            limit = getattr(getattr(model, "config", None), "max_length", None)
        windows = [
            min((w for w in pair if w is not None), default=None)
            for pair in zip(windows, asked, strict=True)
        ]
        if options.get("sinks"):
            frequencies = getattr(
                model, "rope_frequencies", getattr(modules[0], "rope_frequencies", None)
            )
            options.setdefault("rope", frequencies() if frequencies else None)
        return cls(
            len(modules),
            heads,
            widths,
            limit=limit,
            batch=batch,
            dtype=dtype,
            window=windows,
            **options,
        )

    # ------------------------------------------------------------------------------------------
    # memory

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
            positions = min(math.inf if length is None else length, reach)
            dtype = self.dtype or (layer.tensors["k"].dtype if layer.tensors else torch.float32)
            sinks = self.sinks if length is None or length > reach else 0
            total += (
                2 * self.batch * layer.kv_heads * int(positions + sinks) * layer.width_bytes(dtype)
            )
        return total

    @property
    def nbytes(self) -> int:
        """Bytes allocated now; tensors shared with a fork count in both."""
        return sum(layer.nbytes() for layer in self._layers)

    # ------------------------------------------------------------------------------------- one
    # forward pass

    def positions(self, new: int, device: torch.device | None = None) -> Tensor:
        """Positions that the next `new` tokens take: int64 [T], or [B, T] for rows of different
        length.

        Read before the pass. Positions of padding are 0.
        """
        slots = torch.arange(self.length, self.length + new, device=device)
        return (
            slots
            if self.pad is None
            else (slots - self.pad.to(slots.device)[:, None]).clamp_(min=0)
        )

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k, v [B, KV, T, D] of one layer; returns all that it holds, [B, KV, S, D], the new
        ones last.

        Views of the cache where its dtype is that of k, copies otherwise (int8: dequantized).
        Raises ValueError for a window or rows of different length, where not every query sees all
        of it: `attend` knows who sees what.
        """
        if self.pad is not None or any(store.window is not None for store in self._layers):
            raise ValueError("`update` is for rows of one length without a window; use `attend`")
        store = self._write(layer, k, v)
        held = store.between(0, self._end)
        return self._read(held, "k", k.dtype), self._read(held, "v", v.dtype)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, slopes: Tensor | None = None
    ) -> Tensor:
        """Add k, v [B, KV, T, D] and return causal attention of q [B, H, T, D] over all that is
        visible, [B, H, T, D].

        slopes: ALiBi slopes [H]; scores lose slope * distance.
        """
        new = k.shape[2]
        store = self._write(layer, k, v)
        start = self._end - new  # position of the first query
        if self.sinks and store.window and self._end > store.window:
            return self._attend_with_sinks(store, q, start, slopes)
        low = (
            0 if store.window is None else max(0, start - store.window + 1)
        )  # the first position it sees
        held = store.between(low, self._end)
        mask = self._mask(store, new, low, q.device)
        if slopes is not None:
            mask = alibi_bias(slopes.to(q.device, q.dtype), start, new, low, mask)
        if new == 1 and mask is None and store.tensors["k"].dtype == torch.int8:
            return attention_int8(q, held["k"], held["k_scale"], held["v"], held["v_scale"])
        k, v = self._read(held, "k", q.dtype), self._read(held, "v", q.dtype)
        return attention(q, k, v, mask, causal=mask is None and new > 1)

    def open(self, new: int) -> list[Layer] | None:
        """What each layer holds, with room for `new` more positions, for whoever writes those
        itself and then calls `close`.

        None before the first pass and with attention sinks: a position's index isn't fixed then.
        """
        if self.sinks or not all(layer.tensors for layer in self._layers):
            return None
        self._check_room(new)
        for layer in self._layers:
            self._reserve(layer, self.length + new, layer.tensors["k"])
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
        fits = (self.batch, store.kv_heads, new, store.head_dim)
        if k.shape != fits or v.shape != fits:
            raise ValueError(
                f"layer {index}: keys {tuple(k.shape)} and values {tuple(v.shape)} don't fit a "
                f"cache made for "
                f"{self.batch} rows, {store.kv_heads} heads of width {store.head_dim} (another "
                f"model or batch?)"
            )
        if new == 0 or (index and new != self._new):
            raise ValueError(
                f"layer {index} got {new} new positions, where this pass has "
                f"{self._new or 'at least 1'}"
            )
        end = self._check_room(new)
        if index == 0:
            self._new = new
            self._masks.clear()
        self._reserve(store, end, k)
        store.write(self.length, k, v)
        self._end = end
        if index == len(self._layers) - 1:
            self.length, self._new = end, 0
        return store

    def _check_room(self, new: int) -> int:
        if self.limit is not None and self.length + new > self.limit:
            raise ValueError(
                f"{self.length} positions held + {new} new ones pass the cache's limit of "
                f"{self.limit}"
            )
        return self.length + new

    def _read(self, held: dict[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
        x = held[name].to(dtype)
        return x * held[f"{name}_scale"].to(dtype) if f"{name}_scale" in held else x

    def _reserve(self, store: Layer, end: int, like: Tensor) -> None:
        dtype = self.dtype or like.dtype
        store.reserve(
            self.length, end, like, dtype, block=self.block, limit=self.limit, sinks=self.sinks
        )

    # ------------------------------------------------------------------------------------------
    # visibility

    def _mask(self, store: Layer, new: int, low: int, device: torch.device) -> Tensor | None:
        """bool [T, S] or [B, 1, T, S] over positions low.. of this pass; None where everything, or
        the causal part, is seen.
        """
        start = self._end - new
        window = store.window if store.window is not None and self._end > store.window else None
        if self.pad is None and (new == 1 or (start == 0 and low == 0 and window is None)):
            return None
        key = (low, window)
        if key not in self._masks:
            queries = torch.arange(start, self._end, device=device)[:, None]
            keys = torch.arange(low, self._end, device=device)
            visible = keys <= queries
            if window is not None:
                visible &= keys > queries - window
            if self.pad is not None:  # padding sees itself, so that no row of scores is empty
                pad = self.pad.to(device)[:, None, None, None]
                visible = (visible & (keys >= pad)) | (keys == queries)
            self._masks[key] = visible
        return self._masks[key]

    def _attend_with_sinks(
        self, store: Layer, q: Tensor, start: int, slopes: Tensor | None
    ) -> Tensor:
        window = store.window or 0  # sinks have one
        low = max(start - window + 1, self.sinks)
        held = store.between(low, self._end)
        first = store.sinks or {n: t[:, :, : self.sinks] for n, t in store.tensors.items()}
        near = [self._read(held, n, q.dtype) for n in "kv"]
        far = [self._read(first, n, q.dtype) for n in "kv"]
        return attention_with_sinks(
            q, *near, *far, start=start, window=window, rope=self.rope, slopes=slopes
        )

    # ------------------------------------------------------------------------------------------
    # rewriting

    def reset(self, *, batch: int | None = None, pad: Tensor | None = None) -> None:
        """Forget everything, keep the room (unless `batch` changes it). pad: empty positions at the
        left of each row, [B].

        Raises ValueError if `pad` doesn't fit the batch, or together with sinks.
        """
        batch = self.batch if batch is None else batch
        if not is_count(batch, 1):
            raise ValueError(f"batch is {batch!r}; allowed: an integer >= 1")
        if pad is not None:
            if pad.shape != (batch,) or pad.dtype != torch.int64 or bool((pad < 0).any()):
                raise ValueError(
                    f"pad must be int64 [{batch}] and >= 0, got {pad.dtype} {tuple(pad.shape)}: "
                    f"{pad.tolist()}"
                )
            if self.sinks:
                raise ValueError(
                    "rows of different length can't have sinks: their first positions don't line up"
                )
            pad = pad if bool(pad.any()) else None
        for layer in self._layers:
            layer.clear(keep_room=batch == self.batch)
        self.batch, self.pad, self.length, self._new = batch, pad, 0, 0
        self.tokens = self.owner = None

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on. Raises ValueError beyond what is held or behind a
        window's memory.
        """
        if not is_count(length, 0) or length > self.length:
            raise ValueError(
                f"length is {length!r}; allowed: 0 to the {self.length} positions held"
            )
        for layer in self._layers:
            least = layer.first + (layer.window or 0) - 1
            if layer.first and length < least:
                raise ValueError(
                    f"length is {length}; a window of {layer.window} allows {least} to "
                    f"{self.length} by now"
                )
        self.length, self._new = length, 0
        if self.tokens is not None:
            self.tokens = self.tokens[:, :length]

    def fork(self, batch: int | None = None) -> KVCache:
        """A second cache with the same content; with `batch`, that many copies of a single row.

        Nothing is copied until one of the two writes. Raises ValueError for `batch` if this cache
        has several rows.
        """
        if batch is not None and (
            not is_count(batch, 1) or (self.batch != 1 and batch != self.batch)
        ):
            raise ValueError(
                f"batch is {batch!r}; allowed: {self.batch}"
                + (", or any if one row is held" * (self.batch == 1))
            )
        twin = copy.copy(self)
        twin._masks, twin._layers = {}, [layer.fork() for layer in self._layers]
        if batch is not None and batch != self.batch:
            twin._map_rows(lambda t: t.expand(batch, *t.shape[1:]), batch)
        return twin

    def reorder(self, rows: Tensor | Sequence[int]) -> None:
        """Row i becomes what row `rows[i]` was (beam search); rows may repeat or vanish, so the
        batch may change.

        Raises ValueError for a row that isn't held.
        """
        rows = torch.as_tensor(rows)
        if (
            rows.dim() != 1
            or rows.is_floating_point()
            or not len(rows)
            or rows.min() < 0
            or rows.max() >= self.batch
        ):
            raise ValueError(
                f"rows is {rows.tolist()}; allowed: integers from 0 to {self.batch - 1}"
            )
        for layer in self._layers:
            layer.tensors = layer.between(layer.first, self.length)  # free room isn't worth copying
            layer.stop_sharing()
        self._map_rows(lambda t: t.index_select(0, rows.to(t.device)), len(rows))

    def _map_rows(self, change: Callable[[Tensor], Tensor], batch: int) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for layer in self._layers:
                layer.map_rows(change)
            if self.pad is not None:
                self.pad = change(self.pad)
            if self.tokens is not None:
                self.tokens = change(self.tokens)
        self.batch, self._new = batch, 0

    # ------------------------------------------------------------------------------------
    # cross-attention

    def memory(self, layer: int) -> dict[str, Tensor]:
        """What `remember` kept for a layer: k, v [B, KV, S, D] and perhaps mask [B, S]; empty
        before.
        """
        return self._layers[layer].memory

    def remember(self, layer: int, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
        """Keep the keys and values that a cross-attention layer made from an encoder's output, for
        all later passes.

        mask: bool [B, S], True where the encoder's output is real. Kept as they are (no int8),
            until `reset`.
        """
        if (
            k.shape[0] != self.batch
            or k.shape[:3] != v.shape[:3]
            or (mask is not None and mask.shape != k.shape[::2])
        ):
            raise ValueError(
                f"keys {tuple(k.shape)}, values {tuple(v.shape)} and mask don't fit "
                f"{self.batch} rows"
            )
        self._layers[layer].memory = {"k": k.detach(), "v": v.detach()} | (
            {} if mask is None else {"mask": mask}
        )
