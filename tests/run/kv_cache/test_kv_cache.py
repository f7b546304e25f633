"""The cache against the same model without one, and against attention written out."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, run, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_cache_models import KINDS, Decoder, in_pieces

from quantize.run.kv_cache import KVCache


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


def test_works_across_inference_mode():
    """A cache filled in inference mode goes on outside it."""
    model, ids = Decoder(), tokens(1, 12)
    cache = KVCache.for_model(model, limit=12, block=4)
    with torch.inference_mode():
        model(ids[:, :6], cache)
    assert_close(model(ids[:, 6:], cache), run(model, ids)[:, 6:])
