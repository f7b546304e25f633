"""A decoder as a user writes it around `CachedAttention`, and how the tests run it."""

from __future__ import annotations

import torch
from helpers import run
from torch import nn

from quantize.run.kv_cache import CachedAttention
from quantize.run.kv_cache.functions import read

VOCABULARY = 61


class Decoder(nn.Module):
    """What a user writes around `CachedAttention`: two blocks."""

    def __init__(self, layers: int = 2, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.attention = nn.ModuleList(
            CachedAttention(32, 4, layer=i, **options) for i in range(layers)
        )
        self.ffn = nn.ModuleList(nn.Linear(32, 32) for _ in range(layers))
        self.head = nn.Linear(32, VOCABULARY)
        self.eval()

    def forward(self, ids, cache=None):
        x = self.embedding(ids)
        for attend, ffn in zip(self.attention, self.ffn, strict=True):
            x = x + attend(x, cache)
            x = x + torch.tanh(ffn(x))
        return self.head(x)


def in_pieces(model, ids, cache, sizes=None):
    """Logits of a pass per piece; `sizes` default to one token each."""
    pieces = ids.split(sizes or 1, dim=1)
    return torch.cat([run(lambda i: model(i, cache), p) for p in pieces], dim=1)


def keep(cache, layer, x):
    """Let a layer of a cache keep x as keys and as values; the keys that it holds then."""
    cache.attend(layer, x, x, x)
    store = cache._layers[layer]
    return read(store.between(0, cache.length), "k", x.dtype)


KINDS = {
    "rope": {},
    "grouped": {"kv_heads": 2},
    "multi-query": {"kv_heads": 1, "bias": True},
    "no positions": {"position": None},
    "window": {"window": 5, "kv_heads": 2},
    "window of one": {"window": 1, "position": None},
}
