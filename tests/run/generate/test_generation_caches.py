"""Caches that are given to `generate`: carried over, narrow, windowed, another's."""

from __future__ import annotations

import pytest
import torch
from generate_models import VOCABULARY, Plain, by_hand
from helpers import decoder, tokens

from quantize.run.generate import generate, generate_stream
from quantize.run.kv_cache import KVCache


def test_a_cache_carries_over():
    """A given cache isn't read again where the next prompt begins like the text it holds."""
    model, prompt = decoder(), tokens(1, 6)
    cache = KVCache.for_model(model)
    text = generate(model, prompt, max_new_tokens=5, cache=cache)
    assert cache.length == 10
    read = []
    hook = model.register_forward_pre_hook(lambda m, inputs: read.append(inputs[0].shape[1]))
    follow = torch.cat((text, tokens(1, 4, seed=2)), dim=1)
    again = generate(model, follow, max_new_tokens=3, cache=cache)
    hook.remove()
    assert read == [5, 1, 1]
    assert torch.equal(again, by_hand(model, follow, 3))
    changed = follow.clone()
    changed[0, 2] = (changed[0, 2] + 1) % VOCABULARY
    assert torch.equal(
        generate(model, changed, max_new_tokens=3, cache=cache), by_hand(model, changed, 3)
    )


def test_past_the_limit_with_a_window():
    """A windowed cache goes past the model's length; it refuses nothing and reads each
    token once.
    """
    model = decoder(max_length=16)
    cache = KVCache.for_model(model, window=12)
    ids = generate(model, tokens(1, 5), max_new_tokens=200, cache=cache)
    assert ids.shape == (1, 205) and cache.nbytes <= cache.nbytes_at()
    short = generate(model, tokens(1, 5), max_new_tokens=7)
    assert torch.equal(ids[:, :12], short)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_narrow_cache(dtype):
    """A dtype makes the cache hold that dtype, and the tokens follow the same model closely."""
    model, prompt = decoder(), tokens(1, 8)
    ids, scores = generate(model, prompt, max_new_tokens=8, cache=dtype, log_probs=True)
    with torch.no_grad():
        expected = torch.log_softmax(model(ids[:, :-1]), -1)[:, 7:].gather(-1, ids[:, 8:, None])[
            ..., 0
        ]
    assert (scores - expected).abs().max() < 0.1


def test_caches_of_others_are_refused():
    """A cache of another model, shape, batch or text is refused by name, and works again after a
    reset.
    """
    model, prompt = decoder(), tokens(1, 6)
    with pytest.raises(ValueError, match="made for another model"):
        generate(model, prompt, max_new_tokens=3, cache=KVCache.for_model(decoder(layers=3)))
    with pytest.raises(ValueError, match="can't use one"):
        generate(Plain(model), prompt, max_new_tokens=3, cache=KVCache.for_model(model))
    cache = KVCache.for_model(model)
    expected = generate(model, prompt, max_new_tokens=3, cache=cache)
    with pytest.raises(ValueError, match="this model didn't write"):
        generate(decoder(1), prompt, max_new_tokens=3, cache=cache)
    with pytest.raises(ValueError, match="holds 1 rows and the prompt has 2"):
        generate(model, tokens(2, 6), max_new_tokens=3, cache=cache)
    with pytest.raises(
        ValueError, match=r"6 prompt tokens \+ 60 new ones pass the cache's limit of 64"
    ):
        generate(model, prompt, max_new_tokens=60, cache=cache)
    assert torch.equal(generate(model, prompt, max_new_tokens=3, cache=cache), expected)
    with torch.no_grad():
        model(prompt, cache)
    with pytest.raises(ValueError, match="`generate` didn't write"):
        generate(model, prompt, max_new_tokens=3, cache=cache)
    cache.reset()
    assert torch.equal(generate(model, prompt, max_new_tokens=3, cache=cache), expected)


@pytest.mark.parametrize(("new", "kind"), [(1018, torch.int8), (1017, torch.float32)])
def test_long_texts_get_an_int8_cache(new, kind):
    """From 1024 tokens on, prompt included, unless a dtype is asked for."""
    model = decoder(max_length=1024)
    for cache, dtype in ((True, kind), (torch.float32, torch.float32)):
        run = generate_stream(model, tokens(1, 6), max_new_tokens=new, cache=cache)
        next(run)
        next(run)
        held = run._reader.cache.open(1)
        assert {layer.tensors["k"].dtype for layer in held} == {dtype}
