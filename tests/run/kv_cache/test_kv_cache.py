"""The cache against the same model without one, and against attention written out."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close, run, tokens, zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quantize.run.kv_cache import CachedAttention, KVCache
from quantize.run.kv_cache.functions import (
    alibi_slopes,
    attention,
    attention_int8,
    quantize_rows,
    rope_frequencies,
    rotate,
)

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


@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_uncached_at_every_length(kind):
    """One token at a time gives the logits of one pass over everything, for each kind of positions
    and heads.
    """
    model, ids = Decoder(**KINDS[kind]), tokens(2, 23)
    cache = KVCache.for_model(model, batch=2, limit=23, block=4)
    assert_close(in_pieces(model, ids, cache), run(model, ids))


@settings(max_examples=40, deadline=None)
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


@pytest.mark.parametrize("kind", ["grouped", "alibi", "window"])
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


def test_fork_to_many_rows_and_reorder():
    """One prefix continues as several rows; `reorder` moves, repeats and drops them."""
    model, prefix = Decoder(kv_heads=2), tokens(1, 8)
    cache = KVCache.for_model(model, limit=32, block=4)
    in_pieces(model, prefix, cache, 8)
    many = cache.fork(batch=3)
    ids = torch.cat((prefix.expand(3, -1), tokens(3, 5)), dim=1)
    assert_close(in_pieces(model, ids[:, 8:], many), run(model, ids)[:, 8:])
    many.reorder([2, 0, 2, 1])
    ids = torch.cat((ids[[2, 0, 2, 1]], tokens(4, 3, seed=5)), dim=1)
    assert many.batch == 4
    assert_close(in_pieces(model, ids[:, 13:], many), run(model, ids)[:, 13:])
    assert_close(in_pieces(model, prefix, cache), run(model, torch.cat((prefix, prefix), 1))[:, 8:])


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


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.int8, 2e-2)]
)
@pytest.mark.parametrize("kind", ["grouped", "alibi", "window"])
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
    """What `update` returns is a view of the cache, as long as what is held."""
    cache = KVCache(1, 2, 4, limit=1000)
    k, v = torch.randn(2, 1, 2, 3, 4)
    held, _ = cache.update(0, k, v)
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
        cache.update(0, torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
        seen.append(cache._layers[0].capacity)
    assert sorted(set(seen)) == [8, 16, 24, 40, 64, 96, 100]


def test_a_failed_pass_leaves_no_trace():
    """A pass that dies between two layers isn't counted, and the next one gives the right
    logits.
    """
    model, ids = Decoder(kv_heads=2), tokens(1, 12)
    cache = KVCache.for_model(model, limit=12, block=4)
    in_pieces(model, ids[:, :5], cache)
    hook = model.attention[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens(1, 7, seed=9), cache)
    hook.remove()
    assert cache.length == 5
    assert_close(in_pieces(model, ids[:, 5:], cache), run(model, ids)[:, 5:])


def test_works_across_inference_mode():
    """A cache filled in inference mode goes on outside it."""
    model, ids = Decoder(), tokens(1, 12)
    cache = KVCache.for_model(model, limit=12, block=4)
    with torch.inference_mode():
        model(ids[:, :6], cache)
    assert_close(model(ids[:, 6:], cache), run(model, ids)[:, 6:])


def test_bad_input_is_named_and_harmless():
    """Wrong layers, shapes, batches and lengths raise a ValueError that names them, and the cache
    still works.
    """
    model, ids = Decoder(kv_heads=2), tokens(1, 8)
    cache = KVCache.for_model(model, limit=8)
    in_pieces(model, ids[:, :4], cache)
    with pytest.raises(ValueError, match="don't fit a cache made for 1 rows"):
        model(tokens(2, 2), cache)
    with pytest.raises(ValueError, match="don't fit a cache made for 1 rows, 2 heads of width 8"):
        Decoder(kv_heads=4)(ids[:, :2], cache)
    with pytest.raises(ValueError, match="layer is 2; the cache has 2 layers"):
        cache.update(2, torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))
    with pytest.raises(
        ValueError, match=r"4 positions held \+ 5 new ones pass the cache's limit of 8"
    ):
        model(tokens(1, 5), cache)
    with pytest.raises(ValueError, match="length is 9; allowed: 0 to the 4"):
        cache.truncate(9)
    with pytest.raises(ValueError, match=r"rows is .*; allowed: integers from 0 to 0"):
        cache.reorder([1])
    with pytest.raises(ValueError, match="pad must be int64"):
        cache.reset(pad=torch.tensor([-1]))
    assert cache.length == 4
    assert_close(in_pieces(model, ids[:, 4:], cache), run(model, ids)[:, 4:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"kv_heads": [1]}, r"kv_heads is \[1\]; allowed: an integer >= 1, or 2"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"limit": None}, "needs a window"),
        ({"dtype": torch.int32}, "dtype is torch.int32"),
        ({"window": 0}, "window is 0"),
        ({"sinks": 2}, "sinks is 2"),
        ({"window": 4, "sinks": 4}, "sinks is 4"),
        ({"batch": True}, "batch is True"),
    ],
)
def test_bad_shapes_are_named(arguments, message):
    """Each constructor argument out of range is named with its value."""
    with pytest.raises(ValueError, match=message):
        KVCache(**{"layers": 2, "kv_heads": 2, "head_dim": 8, "limit": 16} | arguments)


def test_a_model_without_cache_support_is_refused():
    """`for_model` says so when a model has no attention that knows the cache."""
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no attention layers"):
        KVCache.for_model(zoo("gpt2")[0])


def test_alibi_slopes_of_the_paper():
    """Powers of two as in the paper; between them, its interleaved rule."""
    assert torch.allclose(alibi_slopes(8), torch.tensor([2.0**-i for i in range(1, 9)]))
    assert torch.allclose(alibi_slopes(12)[8:], torch.tensor([2 ** -(i + 0.5) for i in range(4)]))
    assert math.isclose(alibi_slopes(1)[0].item(), 2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_copies_of_one_row_are_taken_apart_whoever_writes_first(dtype):
    """The original goes on, then the copies do, each on memory of its own."""
    torch.manual_seed(0)
    cache = KVCache(1, 2, 4, limit=64, dtype=dtype)
    first, own, theirs = (
        torch.randn(rows, 2, count, 4) for rows, count in ((1, 3), (1, 1), (3, 1))
    )
    held, _ = cache.update(0, first, first)
    copies = cache.fork(3)
    after, _ = cache.update(0, own, own)
    before = after.clone()
    rows, _ = copies.update(0, theirs, theirs)
    assert torch.equal(rows[:, :, :3], held.expand(3, -1, -1, -1))
    assert_close(rows[:, :, 3:], theirs, dtype=torch.bfloat16 if dtype is torch.int8 else dtype)
    assert torch.equal(cache.update(0, own, own)[0][:, :, :4], before)
