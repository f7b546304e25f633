"""A decoder as a user writes it around `CachedAttention`, and how the tests run it."""

from __future__ import annotations

import torch
from helpers import run
from torch import nn

from quantize.run.kv_cache import CachedAttention

VOCABULARY = 61


class Decoder(nn.Module):
    """What a user writes around `CachedAttention`: two blocks, perhaps with cross-attention."""

    def __init__(self, layers: int = 2, cross: bool = False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.attention = nn.ModuleList(
            CachedAttention(32, 4, layer=i, **options) for i in range(layers)
        )
        self.cross = nn.ModuleList(
            CachedAttention(32, 4, layer=i, cross=True, memory_width=24)
            for i in range(layers * cross)
        )
        self.ffn = nn.ModuleList(nn.Linear(32, 32) for _ in range(layers))
        self.head = nn.Linear(32, VOCABULARY)
        self.eval()

    def forward(self, ids, cache=None, **memory):
        x = self.embedding(ids)
        for i, (attend, ffn) in enumerate(zip(self.attention, self.ffn, strict=True)):
            x = x + attend(x, cache)
            if self.cross:
                x = x + self.cross[i](x, cache, **memory)
            x = x + torch.tanh(ffn(x))
        return self.head(x)


def in_pieces(model, ids, cache, sizes=None, **memory):
    """Logits of a pass per piece; `sizes` default to one token each."""
    pieces = ids.split(sizes or 1, dim=1)
    return torch.cat([run(lambda i: model(i, cache, **memory), p) for p in pieces], dim=1)


KINDS = {
    "rope": {},
    "grouped": {"kv_heads": 2},
    "multi-query": {"kv_heads": 1, "bias": True},
    "alibi": {"position": "alibi", "kv_heads": 2},
    "no positions": {"position": None},
    "window": {"window": 5, "kv_heads": 2},
    "alibi window": {"window": 7, "position": "alibi"},
}
