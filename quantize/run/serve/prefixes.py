"""Prompts read a short while ago, kept so that what they share isn't read again.

A prompt is taken over whole, or in whole pieces of `generate`'s CHUNK: so much of it was computed
in the very passes in which the other would compute it, and gives the same bits. Models of integer
weights give the same bits in whatever passes a prompt is read, so any part of it is taken over.
Nothing is copied before one of the two texts goes on.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.run.generate.reader import CHUNK
from quantize.run.kv_cache import KVCache

Name = tuple[torch.dtype | None, bytes]  # of the cache and of the prompt
LEAST = 32  # tokens of a prompt that is worth keeping


@dataclass(frozen=True)
class Prefix:
    """A cache that holds a prompt or the beginning of one; logits [1, V] if it is all of it."""

    cache: KVCache
    logits: Tensor | None


class Prefixes:
    """The prompts that were used last, up to `most_bytes` of keys and values."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._kept: OrderedDict[Name, tuple[Tensor, Prefix]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return sum(prefix.cache.nbytes for _, prefix in self._kept.values())

    def keep(self, ids: Tensor, cache: KVCache, logits: Tensor) -> None:
        """Keep a prompt [T] that was just read into `cache`, with its logits [1, V]."""
        if len(ids) < LEAST or cache.nbytes > self.most_bytes or not self.most_bytes:
            return
        name = cache.dtype, ids.numpy().tobytes()
        self._kept[name] = ids, Prefix(cache.fork(), logits)
        self._kept.move_to_end(name)
        while self.nbytes > self.most_bytes:
            self._kept.popitem(last=False)

    def find(self, ids: Tensor, like: KVCache, piece: int = CHUNK) -> Prefix | None:
        """The most that is kept of a prompt, in a cache of the caller's own.

        Args:
            ids: of the prompt [T].
            like: a cache of the dtype and the limit that it has to have.
            piece: a part of a prompt is taken over in whole pieces of so many tokens.
        """
        name = like.dtype, ids.numpy().tobytes()
        if name in self._kept:
            whole = self._kept[name][1]
            self._kept.move_to_end(name)
            return Prefix(_twin(whole.cache, like), whole.logits)
        shared = {
            key: _shared(ids, kept, piece)
            for key, (kept, _) in self._kept.items()
            if key[0] == like.dtype
        }
        best = max(shared, key=lambda key: shared[key], default=None)
        if best is None or not shared[best]:
            return None
        self._kept.move_to_end(best)
        twin = _twin(self._kept[best][1].cache, like)
        try:
            twin.truncate(shared[best])
        except ValueError:  # a window has left it behind
            return None
        return Prefix(twin, None)


def _twin(cache: KVCache, like: KVCache) -> KVCache:
    twin = cache.fork()
    twin.limit = like.limit
    return twin


def _shared(ids: Tensor, kept: Tensor, piece: int) -> int:
    """Tokens that two prompts have in common, in whole pieces; fewer than `ids` has."""
    reach = min(len(ids) - 1, len(kept))
    same = int((ids[:reach] == kept[:reach]).cumprod(0).sum())
    return same // piece * piece
