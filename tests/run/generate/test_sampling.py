"""Sampling against its definitions: limits, frequencies, seeds, the penalty for repetition."""

from __future__ import annotations

import torch
from helpers import assert_close, decoder, tokens

from quantize.run.generate import generate
from quantize.run.generate.sampling import Sampling, distribution, draw


def test_limits_keep_the_right_tokens():
    """top-k, top-p, min-p and the temperature keep and weigh what their definitions say."""
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()[:, [3, 0, 4, 1, 2]]

    def kept(**settings):
        return distribution(logits, Sampling(temperature=1.0, **settings)).exp()[0]

    assert_close(kept(), torch.tensor([0.1, 0.5, 0.05, 0.2, 0.15]))
    assert_close(kept(top_k=2), torch.tensor([0, 5 / 7, 0, 2 / 7, 0]))
    assert_close(kept(top_p=0.75), torch.tensor([0, 0.5, 0, 0.2, 0.15]) / 0.85)
    assert_close(kept(top_p=0.4), torch.tensor([0, 1.0, 0, 0, 0]))
    assert_close(kept(min_p=0.25), torch.tensor([0, 0.5, 0, 0.2, 0.15]) / 0.85)
    assert_close(kept(top_k=4, top_p=0.8), torch.tensor([0, 0.5, 0, 0.2, 0.15]) / 0.85)
    squared = distribution(logits, Sampling(temperature=0.5)).exp()[0]
    assert_close(squared, logits[0].exp().square() / logits.exp().square().sum())


def test_top_p_of_a_large_vocabulary():
    """The nucleus is found without sorting everything: the fewest tokens that hold the mass."""
    logits = torch.randn(3, 5000)
    for top_p in (0.01, 0.5, 0.999):
        kept = distribution(logits, Sampling(temperature=1.0, top_p=top_p)) > -torch.inf
        for row, mask in zip(torch.softmax(logits, -1), kept, strict=True):
            assert row[mask].sum() >= top_p - 1e-5
            assert row[mask].sum() - row[mask].min() < top_p + 1e-5
            assert row[mask].min() > row[~mask].max()


def test_draws_follow_the_distribution():
    """Draws for many seeds have the frequencies of the distribution (chi-squared, 20000 draws)."""
    log_probs = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04]).log()
    drawn = draw(log_probs.expand(20000, -1), list(range(20000)), position=7)
    counts, expected = torch.bincount(drawn, minlength=5), 20000 * log_probs.exp()
    assert (
        (counts - expected) ** 2 / expected
    ).sum() < 18.5  # 0.999 quantile at 4 degrees of freedom


def test_draws_of_one_seed_follow_it_over_positions():
    """So have the draws of one seed at many positions, and neighbours in position are
    independent.
    """
    log_probs = torch.tensor([[0.5, 0.3, 0.2]]).log()
    drawn = torch.tensor([draw(log_probs, [1], position=p).item() for p in range(6000)])
    pairs = torch.bincount(drawn[:-1] * 3 + drawn[1:], minlength=9).view(3, 3)
    expected = 5999 * log_probs.exp().T * log_probs.exp()
    assert (
        (pairs - expected) ** 2 / expected
    ).sum() < 26.1  # 0.999 quantile at 8 degrees of freedom


def test_a_seed_belongs_to_its_row():
    """A row's sample doesn't depend on its neighbours, the cache or the batch: row i of seed s is
    seed s + i alone.
    """
    model, prompt = decoder(), tokens(3, 6)
    settings = {"max_new_tokens": 10, "temperature": 1.2, "top_p": 0.95}
    together = generate(model, prompt, seed=5, **settings)
    for i in range(3):
        assert torch.equal(
            generate(model, prompt[i : i + 1], seed=5 + i, cache=False, **settings)[0], together[i]
        )
    assert torch.equal(generate(model, prompt, seed=[5, 6, 7], **settings), together)
    assert not torch.equal(generate(model, prompt, seed=8, **settings), together)


def test_repetition_penalty():
    """A strong penalty keeps greedy decoding from any token it has seen."""
    model, prompt = decoder(), tokens(1, 6)
    ids = generate(model, prompt, max_new_tokens=20, repetition_penalty=1e9)[0]
    assert len(set(ids[6:].tolist())) == 20 and not set(ids[6:].tolist()) & set(prompt[0].tolist())
