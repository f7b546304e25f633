"""A draft changes no token, whoever guesses and however long."""

from __future__ import annotations

import pytest
import torch
from generate_models import VOCABULARY, Plain, by_hand
from helpers import decoder, tokens
from torch import nn

from quantize.run.generate import generate, generate_stream


class Counter(nn.Module):
    """Counts to 20 and starts again."""

    def forward(self, ids):
        return nn.functional.one_hot((ids + 1) % 20, VOCABULARY).float()


@pytest.mark.parametrize("count", [None, 1, 4, 9])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.8, "seed": 1},
        {"temperature": 1.0, "seed": 2, "top_k": 8, "repetition_penalty": 1.3},
    ],
)
def test_a_draft_changes_no_token(count, settings):
    """Any draft, good, bad or the model itself, and look-up give the tokens of plain decoding, at
    any draft length.
    """
    model, prompt = decoder(), torch.cat((tokens(1, 5), tokens(1, 5)), dim=1)
    expected = generate(model, prompt, max_new_tokens=20, **settings)
    for draft in (model, decoder(1), Plain(decoder(1)), "lookup"):
        run = generate_stream(
            model, prompt, max_new_tokens=20, draft=draft, draft_tokens=count, **settings
        )
        list(run)
        assert torch.equal(run.result, expected)
    assert generate_stream(model, prompt, max_new_tokens=3, cache=False, draft="lookup").batch == 1


def test_the_model_as_its_own_draft_is_always_right():
    """A draft with the same distribution guesses every token, sampled ones too: they share the
    noise.
    """
    model = decoder()
    for settings in ({}, {"temperature": 1.0, "seed": 0}):
        run = generate_stream(
            model, tokens(2, 5), max_new_tokens=30, draft=model, draft_tokens=4, **settings
        )
        list(run)
        assert run.drafted and run.accepted == run.drafted


def test_look_up_finds_repeats():
    """On a text that repeats itself, look-up guesses most tokens."""
    run = generate_stream(
        Counter(), tokens(1, 5), max_new_tokens=90, draft="lookup", draft_tokens=4
    )
    list(run)
    assert run.accepted / run.drafted > 0.9 and run.drafted > 50


def test_drafts_of_a_ragged_batch_with_stops():
    """Drafts work on rows of different length, of which some stop early."""
    model, prompts = decoder(), [tokens(n, seed=n) for n in (3, 9)]
    stop = by_hand(model, prompts[0][None], 5)[0, -1].item()
    expected = generate(model, prompts, max_new_tokens=20, stop_tokens=stop)
    rows = generate(
        model, prompts, max_new_tokens=20, stop_tokens=stop, draft=decoder(1), draft_tokens=3
    )
    assert all(torch.equal(a, b) for a, b in zip(rows, expected, strict=True))
