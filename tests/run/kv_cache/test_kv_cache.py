"""The cache against the same model without one, and against attention written out."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close, run, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_cache_models import KINDS, Decoder, in_pieces

from quantize.run.kv_cache import KVCache
from quantize.run.kv_cache.functions import (
    alibi_slopes,
    attention,
    rope_frequencies,
    rotate,
)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_uncached_at_every_length(kind):
    """One token at a time gives the logits of one pass over everything, for each kind of positions
    and heads.
    """
    model, ids = Decoder(**KINDS[kind]), tokens(2, 23)
    cache = KVCache.for_model(model, batch=2, limit=23, block=4)
    assert_close(in_pieces(model, ids, cache), run(model, ids))


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.sampled_from(sorted(KINDS)),
    st.integers(1, 9),
)
def test_chunks_of_any_size(sizes, kind, block):
    """However the tokens are cut into passes, and however the cache grows, the logits are the
    same.
    """
    model, ids = Decoder(**KINDS[kind]), tokens(1, sum(sizes))
    cache = KVCache.for_model(model, limit=sum(sizes), block=block)
    assert_close(in_pieces(model, ids, cache, sizes), run(model, ids))
    assert cache.length == sum(sizes)


def test_long_window_drops_and_stays_right():
    """A windowed layer drops what it can't see: its room stays bounded while the logits stay those
    of a mask.
    """
    model, ids = Decoder(window=6, kv_heads=2), tokens(1, 400)
    cache = KVCache.for_model(model, window=6, block=8)
    assert_close(in_pieces(model, ids, cache, [3] * 133 + [1]), run(model, ids))
    assert cache.limit is None and cache.nbytes <= cache.nbytes_at() < 400 * 2 * 2 * 2 * 8 * 4 / 4


@pytest.mark.parametrize("position", ["rope", "alibi", None])
def test_sinks_equal_dense_attention(position):
    """With sinks, each query sees them and its window, as dense attention over positions counted
    within the cache.
    """
    model, ids, window, sinks = (
        Decoder(layers=1, position=position, kv_heads=2),
        tokens(2, 150),
        9,
        3,
    )
    layer = model.attention[0]
    seen = []
    layer.register_forward_hook(lambda m, i, o: seen.append(o))
    for sizes in ([1] * 150, [4, 40, 2, 1, 3, 100]):
        in_pieces(
            model,
            ids,
            KVCache.for_model(model, batch=2, window=window, sinks=sinks, block=4),
            sizes,
        )
    one_by_one, chunked = torch.cat(seen[:150], 1), torch.cat(seen[150:], 1)

    with (
        torch.no_grad()
    ):  # each query alone: sinks and window put side by side at positions 0, 1, 2, ...
        x = model.embedding(ids)
        q, k, v = (layer._split(p(x)) for p in (layer.q, layer.k, layer.v))
        rows = []
        for t in range(150):
            held = [p for p in range(t + 1) if p < sinks or p > t - window]
            at = torch.arange(len(held))
            turn = (
                (lambda y, p: rotate(y, p[:, None] * rope_frequencies(8)))
                if position == "rope"
                else lambda y, p: y
            )
            bias = (
                alibi_slopes(4)[:, None, None] * (at - at[-1])[None]
                if position == "alibi"
                else None
            )
            rows.append(
                attention(
                    turn(q[:, :, t : t + 1], at[-1:]), turn(k[:, :, held], at), v[:, :, held], bias
                )
            )
        expected = layer._join(torch.cat(rows, dim=2))
    assert_close(one_by_one, expected)
    assert_close(chunked, expected)


def test_cross_attention_is_computed_once():
    """Cross-attention reads the encoder's output in the first pass only, ragged memories masked;
    rows can be reordered.
    """
    model, ids = Decoder(cross=True), tokens(2, 9)
    memory = {
        "memory": torch.randn(2, 7, 24),
        "memory_mask": torch.arange(7) < torch.tensor([[7], [4]]),
    }
    expected = run(lambda i: model(i, **memory), ids)
    cut = {"memory": memory["memory"][1:, :4]}
    assert_close(expected[1:], run(lambda i: model(i, **cut), ids[1:]))
    cache = KVCache.for_model(model, batch=2, limit=9)
    first = run(lambda i: model(i, cache, **memory), ids[:, :4])
    assert_close(torch.cat((first, in_pieces(model, ids[:, 4:8], cache)), 1), expected[:, :8])
    cache.reorder([1, 0])
    assert_close(in_pieces(model, ids[[1, 0], 8:], cache), expected[[1, 0], 8:])
    cache.reset()
    with pytest.raises(ValueError, match="needs `memory`"):
        model(ids, cache)


def test_works_across_inference_mode():
    """A cache filled in inference mode goes on outside it."""
    model, ids = Decoder(), tokens(1, 12)
    cache = KVCache.for_model(model, limit=12, block=4)
    with torch.inference_mode():
        model(ids[:, :6], cache)
    assert_close(model(ids[:, 6:], cache), run(model, ids)[:, 6:])


def test_alibi_slopes_of_the_paper():
    """Powers of two as in the paper; between them, its interleaved rule."""
    assert torch.allclose(alibi_slopes(8), torch.tensor([2.0**-i for i in range(1, 9)]))
    assert torch.allclose(alibi_slopes(12)[8:], torch.tensor([2 ** -(i + 0.5) for i in range(4)]))
    assert math.isclose(alibi_slopes(1)[0].item(), 2**-8)
