"""The rows of a cache: ragged, cut back, forked."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, run, tokens
from kv_cache_models import KINDS, Decoder, in_pieces, keep
from torch import nn

from quantize.run.kv_cache import KVCache


@pytest.mark.parametrize("kind", ["grouped", "no positions", "window"])
def test_ragged_rows(kind):
    """Rows of different length, empty on the left, give each row's own logits."""
    model, lengths = Decoder(**KINDS[kind]), [3, 9, 1]
    rows = [tokens(1, n + 6, seed=n)[0] for n in lengths]
    pad = torch.tensor([9 - n for n in lengths])
    ids = torch.stack(
        [nn.functional.pad(row, (int(p), 0)) for row, p in zip(rows, pad, strict=True)]
    )
    cache = KVCache.for_model(model, batch=3, limit=15, block=4)
    cache.reset(pad=pad)
    logits = in_pieces(model, ids, cache, [4, 5, 1, 1, 3, 1])
    for row, p, got in zip(rows, pad, logits, strict=True):
        assert_close(got[p:], run(model, row[None])[0])


@pytest.mark.parametrize("dtype", [None, torch.int8])
def test_truncate_and_continue(dtype):
    """After `truncate` the cache is that of the shorter text."""
    model, ids, other = Decoder(kv_heads=2), tokens(1, 20), tokens(1, 6, seed=1)
    cache, fresh = (KVCache.for_model(model, limit=40, dtype=dtype, block=4) for _ in range(2))
    in_pieces(model, ids, cache)
    cache.truncate(11)
    in_pieces(model, ids[:, :11], fresh)
    assert_close(in_pieces(model, other, cache), in_pieces(model, other, fresh))


def test_truncate_behind_a_window():
    """Within the slack a windowed cache can be cut; beyond it the call says what is allowed and
    changes nothing.
    """
    model, ids = Decoder(window=6), tokens(1, 300)
    cache = KVCache.for_model(model, window=6, block=8)
    in_pieces(model, ids, cache, 10)
    cache.truncate(280)
    assert_close(in_pieces(model, ids[:, 280:], cache), run(model, ids)[:, 280:])
    with pytest.raises(ValueError, match="length is 20; a window of 6 allows"):
        cache.truncate(20)
    assert cache.length == 300


def test_fork_copies_only_when_written():
    """Forks share the prefix's memory until one writes, and neither sees what the other wrote."""
    model, ids = Decoder(kv_heads=2), tokens(1, 30)
    cache = KVCache.for_model(model, limit=64, block=8)
    in_pieces(model, ids[:, :10], cache, 5)
    twin = cache.fork()
    pointer = cache._layers[0].tensors["k"].data_ptr()
    assert twin._layers[0].tensors["k"].data_ptr() == pointer
    other = torch.cat((ids[:, :10], tokens(1, 7, seed=3)), dim=1)
    assert_close(in_pieces(model, other[:, 10:], twin), run(model, other)[:, 10:])
    assert_close(in_pieces(model, ids[:, 10:], cache), run(model, ids)[:, 10:])
    assert_close(
        in_pieces(model, ids[:, 17:20], twin),
        run(model, torch.cat((other, ids[:, 17:20]), 1))[:, 17:],
    )


def test_fork_to_many_rows():
    """One prefix continues as several rows, and by itself."""
    model, prefix = Decoder(kv_heads=2), tokens(1, 8)
    cache = KVCache.for_model(model, limit=32, block=4)
    in_pieces(model, prefix, cache, 8)
    many = cache.fork(batch=3)
    ids = torch.cat((prefix.expand(3, -1), tokens(3, 5)), dim=1)
    assert_close(in_pieces(model, ids[:, 8:], many), run(model, ids)[:, 8:])
    assert_close(in_pieces(model, prefix, cache), run(model, torch.cat((prefix, prefix), 1))[:, 8:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_copies_of_one_row_are_taken_apart_whoever_writes_first(dtype):
    """The original goes on, then the copies do, each on memory of its own."""
    torch.manual_seed(0)
    cache = KVCache(1, 2, 4, limit=64, dtype=dtype)
    first, own, theirs = (
        torch.randn(rows, 2, count, 4) for rows, count in ((1, 3), (1, 1), (3, 1))
    )
    held = keep(cache, 0, first)
    copies = cache.fork(3)
    before = keep(cache, 0, own).clone()
    rows = keep(copies, 0, theirs)
    assert torch.equal(rows[:, :, :3], held.expand(3, -1, -1, -1))
    assert_close(rows[:, :, 3:], theirs, dtype=torch.bfloat16 if dtype is torch.int8 else dtype)
    assert torch.equal(keep(cache, 0, own)[:, :, :4], before)
