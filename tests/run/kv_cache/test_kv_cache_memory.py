"""What a cache holds: narrow dtypes, bytes, growth by blocks."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, run, tokens
from kv_cache_models import KINDS, Decoder, in_pieces, keep

from quantize.run.kv_cache import KVCache
from quantize.run.kv_cache.functions import (
    attention,
    attention_int8,
    quantize_rows,
)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.int8, 2e-2)]
)
@pytest.mark.parametrize("kind", ["grouped", "no positions", "window"])
def test_narrow_caches_come_close(dtype, tolerance, kind):
    """16-bit and int8 caches differ from fp32 by their rounding, the same for one token at a time
    and for chunks.
    """
    model, ids = Decoder(**KINDS[kind]), tokens(2, 40)
    chunked, single = (
        KVCache.for_model(model, batch=2, limit=40, dtype=dtype, block=8) for _ in range(2)
    )
    logits = in_pieces(model, ids, single)
    assert (logits - run(model, ids)).abs().max() < tolerance
    assert_close(in_pieces(model, ids, chunked, [7, 30, 3]), logits, factor=10)


def test_int8_rows_keep_their_range():
    """int8 rows are within half a step of the input, from 1e-20 to 1e20, and zero stays zero."""
    x = torch.randn(6, 4, 16) * torch.tensor([0.0, 1e-20, 1e-3, 1.0, 1e4, 1e20])[:, None, None]
    values, scale = quantize_rows(x)
    assert values.dtype == torch.int8
    assert ((values * scale.float() - x).abs() <= scale.float() * 0.5001).all()


def test_int8_attention_equals_dequantized_attention():
    """Scales on scores and probabilities give what dequantized keys and values give."""
    q, k, v = torch.randn(2, 6, 1, 16), torch.randn(2, 3, 33, 16), torch.randn(2, 3, 33, 16)
    (k, k_scale), (v, v_scale) = quantize_rows(k), quantize_rows(v)
    assert_close(
        attention_int8(q, k, k_scale, v, v_scale),
        attention(q, k * k_scale.float(), v * v_scale.float()),
    )


def test_bytes_before_and_after():
    """Sizes are known before anything is allocated, are those allocated at the limit, and int8
    takes at most 0.28 of fp32.
    """
    model, sizes = Decoder(kv_heads=2), {}
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        cache = KVCache(4, 3, 64, limit=50, batch=2, dtype=dtype)
        assert cache.nbytes == 0
        sizes[dtype] = cache.nbytes_at()
        held = KVCache.for_model(model, batch=2, limit=24, dtype=dtype, block=8)
        in_pieces(model, tokens(2, 24), held, 6)
        assert held.nbytes == held.nbytes_at()
    assert sizes[torch.float32] == 4 * 2 * 2 * 3 * 50 * 64 * 4
    assert sizes[torch.bfloat16] == sizes[torch.float32] / 2
    assert sizes[torch.int8] <= 0.28 * sizes[torch.float32]


def test_attention_runs_over_held_positions_only():
    """What a layer reads is a view of the cache, as long as what is held."""
    cache = KVCache(1, 2, 4, limit=1000)
    k = torch.randn(1, 2, 3, 4)
    held = keep(cache, 0, k)
    assert held.shape == (1, 2, 3, 4) and torch.equal(held, k)
    assert (
        held.untyped_storage().data_ptr()
        == cache._layers[0].tensors["k"].untyped_storage().data_ptr()
    )


def test_growth_is_by_blocks_up_to_the_limit():
    """Capacity is a multiple of the block, at least half as much again, and never beyond the
    limit.
    """
    cache, seen = KVCache(1, 1, 2, limit=100, block=8), []
    for _ in range(100):
        keep(cache, 0, torch.zeros(1, 1, 1, 2))
        seen.append(cache._layers[0].capacity)
    assert sorted(set(seen)) == [8, 16, 24, 40, 64, 96, 100]
