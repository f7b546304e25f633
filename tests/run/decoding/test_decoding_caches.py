"""Native decoding on caches of others, forked ones, padded ones."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from decoding_models import PROMPT, decoder
from helpers import assert_close, tokens

import quantize
from quantize.native import build
from quantize.run.decoding import caches, native
from quantize.run.kv_cache import KVCache

pytestmark = [
    pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("compiled"),
]


def test_a_cache_of_another_model_is_refused():
    """By its own error, before native code writes into it: fewer layers, other heads, another
    width, more rows.
    """
    fast = quantize.for_decoding(decoder(), backend="native")
    with torch.no_grad():
        for other in (decoder(layers=1), decoder(kv_heads=1), decoder(head_dim=16)):
            cache = KVCache.for_model(other)
            other(PROMPT, cache)
            with pytest.raises(ValueError, match="another model"):
                fast(PROMPT[:, :1], cache)
        cache = KVCache.for_model(fast, batch=2)
        fast(PROMPT.expand(2, -1), cache)
        with pytest.raises(ValueError, match="don't fit a cache made for 2 rows"):
            fast(PROMPT[:, :1], cache)


def test_a_forked_cache_is_written_on_its_own_memory():
    """Copies of one row that share memory are taken apart before native code writes, whoever writes
    first.
    """
    model = decoder()
    fast, cache = quantize.for_decoding(model, backend="native"), KVCache.for_model(model)
    with torch.no_grad():
        model(PROMPT, cache)
        twin, expected = cache.fork(3), KVCache.for_model(model, batch=3)
        model(PROMPT.expand(3, -1), expected)
        fast(PROMPT[:, :1], cache)
        tokens = torch.tensor([[7], [8], [9]])
        assert_close(fast(tokens, twin), model(tokens, expected))
        assert twin.length == 6


def test_padding_longer_than_the_text_is_left_to_the_model():
    """A row that is nothing but padding sees itself there; natively it would see nothing."""
    model = decoder()
    fast = quantize.for_decoding(model, backend="native")
    pad, texts = torch.tensor([4, 0]), PROMPT.expand(2, -1)
    caches = [KVCache.for_model(model, batch=2) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            cache.reset(batch=2, pad=pad)
        for i in range(5):
            got, expected = (
                m(texts[:, i : i + 1], c) for m, c in zip((fast, model), caches, strict=True)
            )
            assert_close(got, expected)


def test_step_checks_every_tensor_of_the_cache():
    """A tensor of another dtype or shape is never handed to C++ as what it isn't, also in a cache
    that was read before.
    """
    model = decoder()
    step = native.Step(model)
    spoils = (
        lambda layer: layer.tensors.update(k=layer.tensors["k"].double()),
        lambda layer: layer.tensors.update(v=layer.tensors["v"][:, :1]),
        lambda layer: layer.tensors.pop("v"),
        lambda layer: setattr(layer, "first", -3),
    )
    for spoil, reads in product(spoils, (0, 2)):
        cache = KVCache.for_model(model, block=64)
        with torch.no_grad():
            model(PROMPT, cache)
        for _ in range(reads):
            assert step(PROMPT[:, :1], cache, 1) is not None
        spoil(cache._layers[1])
        assert step(PROMPT[:, :1], cache, 1) is None


def test_what_was_noted_of_a_cache_is_dropped_with_it():
    """A cache that grows, is forked or stands at its limit is looked at again; a model of other
    sizes can't read it.
    """
    model, other = decoder(), decoder(kv_heads=4)
    steps = native.Step(model), native.Step(other)
    cache, expected = (KVCache.for_model(model, limit=40, block=4) for _ in range(2))
    with torch.no_grad():
        for read in (cache, expected):
            model(PROMPT, read)
        forks = []
        for token in tokens(30, 1, 1):
            assert steps[1](token, cache, 1) is None
            assert_close(steps[0](token, cache, 1), model(token, expected))
            forks.append((cache.fork(), cache.length))
    for fork, length in forks:
        for kept, final in zip(fork._layers, cache._layers, strict=True):
            whole = final.between(0, length)
            assert all(torch.equal(t, whole[n]) for n, t in kept.between(0, length).items())
    with pytest.raises(ValueError, match="limit"):
        for _ in range(40):
            steps[0](PROMPT[:, :1], cache, 1)


def test_a_long_cache_is_moved_into_huge_pages_once(monkeypatch):
    """All its tensors, and only when tokens follow one by one."""
    moved = []
    monkeypatch.setattr(caches, "LONG_BYTES", 1)
    monkeypatch.setattr(caches, "MANY_STEPS", 3)
    monkeypatch.setattr(caches, "use_huge_pages", moved.append)
    fast = quantize.for_decoding(decoder(), backend="native")
    cache = KVCache.for_model(fast)
    with torch.no_grad():
        for piece in (PROMPT, PROMPT, PROMPT[:, :1], PROMPT[:, :1]):
            fast(piece, cache)
        assert not moved
        for _ in range(5):
            fast(PROMPT[:, :1], cache)
    (blocks,) = moved
    assert sum(size for _, size in blocks) == cache.nbytes
