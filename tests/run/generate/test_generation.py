"""Generation against the model called on the whole text, token by token."""

from __future__ import annotations

import pytest
import torch
from generate_models import VOCABULARY, Plain, by_hand
from helpers import assert_close, decoder, tokens, zoo

from quantize.run.generate import decode, generate, generate_stream, prefill
from quantize.run.kv_cache import KVCache


@pytest.mark.slow
def test_greedy_equals_its_definition_at_every_prompt_length():
    """With and without a cache, greedy tokens are those of the model called on the whole text."""
    model = decoder()
    for length in range(1, 60):
        prompt = tokens(2, length, seed=length)
        expected = by_hand(model, prompt, 4)
        assert torch.equal(generate(model, prompt, max_new_tokens=4), expected)
        assert torch.equal(generate(model, prompt, max_new_tokens=4, cache=False), expected)
    assert torch.equal(generate(Plain(model), prompt, max_new_tokens=4), expected)


def test_prefill_and_decode_are_the_stages():
    """`prefill` in chunks of any size and `decode` give the logits of the whole text."""
    model, ids = decoder(), tokens(2, 20)
    with torch.no_grad():
        for chunk in (1, 7, 100):
            cache = KVCache.for_model(model, batch=2)
            assert_close(prefill(model, ids[:, :19], cache, chunk=chunk), model(ids)[:, 18])
            assert_close(decode(model, ids[:, 19], cache), model(ids)[:, 19])


def test_prompts_of_different_length():
    """A list of prompts gives each prompt's own continuation, with and without a cache."""
    model, prompts = decoder(), [tokens(n, seed=n) for n in (3, 11, 1, 11)]
    expected = [by_hand(model, p[None], 8)[0] for p in prompts]
    for cache in (True, False):
        rows = generate(model, [p.tolist() for p in prompts], max_new_tokens=8, cache=cache)
        assert all(torch.equal(a, b) for a, b in zip(rows, expected, strict=True))


def test_stop_tokens_end_a_row():
    """A row stops with the stop token, is filled with it in a tensor and cut after it in a list;
    the rest goes on.
    """
    model, prompt = decoder(), tokens(2, 5)
    full = by_hand(model, prompt, 12)
    stop = full[0, 8].item()
    assert stop not in full[0, 5:8] and stop not in full[1, 5:]
    ids = generate(model, prompt, max_new_tokens=12, stop_tokens=stop)
    assert torch.equal(ids[1], full[1])
    assert torch.equal(ids[0, :9], full[0, :9]) and (ids[0, 9:] == stop).all()
    rows = generate(model, list(prompt), max_new_tokens=12, stop_tokens=[stop])
    assert torch.equal(rows[0], full[0, :9]) and torch.equal(rows[1], full[1])
    assert generate(model, prompt[:1], max_new_tokens=12, stop_tokens=stop).shape == (1, 9)


def test_the_models_own_end_of_text():
    """By default the end-of-text id in the model's config stops a row; () lets it run."""
    model, prompt = decoder(), tokens(1, 5)
    full = by_hand(model, prompt, 6)
    outer = Plain(model)
    outer.config = type(
        "Config", (), {"eos_token_id": full[0, 6].item(), "vocab_size": VOCABULARY}
    )()
    assert torch.equal(generate(outer, prompt, max_new_tokens=6), full[:, :7])
    assert torch.equal(generate(outer, prompt, max_new_tokens=6, stop_tokens=()), full)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "seed": 3}, {"draft": "lookup", "draft_tokens": 3}]
)
def test_stream_gives_the_same_tokens(options):
    """The stream's tokens, put together, are what `generate` returns."""
    model, prompt = decoder(), tokens(1, 5)
    expected = generate(model, prompt, max_new_tokens=12, **options)
    stream = generate_stream(model, prompt, max_new_tokens=12, **options)
    assert torch.equal(torch.cat((prompt, torch.stack(list(stream), dim=1)), dim=1), expected)


def test_log_probs_are_the_models_own():
    """Log-probabilities are those of the chosen tokens under the plain softmax, whatever the
    sampling.
    """
    model, prompt = decoder(), tokens(2, 5)
    ids, scores = generate(
        model, prompt, max_new_tokens=6, temperature=0.7, top_k=5, seed=0, log_probs=True
    )
    with torch.no_grad():
        expected = torch.log_softmax(model(ids[:, :-1]), -1)[:, 4:].gather(-1, ids[:, 5:, None])[
            ..., 0
        ]
    assert_close(scores, expected)


def test_models_of_transformers():
    """A transformers model generates what its own `generate` does."""
    model, inputs = zoo("llama")
    mask = torch.ones_like(inputs["input_ids"])
    expected = model.generate(
        **inputs, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert torch.equal(
        generate(model, inputs["input_ids"], max_new_tokens=6, stop_tokens=()), expected
    )


def test_results_are_ordinary_tensors():
    """Ids can go straight into a pass with gradients."""
    model = decoder()
    ids = generate(model, tokens(1, 4), max_new_tokens=3)
    model(ids).sum().backward()
    assert not ids.is_inference()


def test_logits_that_are_not_finite():
    """NaN logits stop generation with an error that says where, and the cache works again."""
    model, prompt = decoder(), tokens(1, 6)
    cache = KVCache.for_model(model)
    expected = generate(model, prompt, max_new_tokens=4, cache=cache)
    hook = model.head.register_forward_hook(lambda m, i, o: o * float("nan"))
    for settings in ({}, {"temperature": 1.0}):
        with pytest.raises(ValueError, match=r"logits for position 6 aren't finite in row \[0\]"):
            generate(model, prompt, max_new_tokens=4, cache=cache, **settings)
    hook.remove()
    assert torch.equal(generate(model, prompt, max_new_tokens=4, cache=cache), expected)
