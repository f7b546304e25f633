"""Generation against the model called on the whole text, token by token."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from helpers import assert_close, decoder, tokens, zoo
from torch import nn

from quantize.checkpoint import save
from quantize.run.generate import decode, generate, generate_stream, prefill
from quantize.run.generate.sampling import Sampling, distribution, draw
from quantize.run.generate.text import Text
from quantize.run.kv_cache import KVCache

VOCABULARY = 61


def by_hand(model, ids: torch.Tensor, new: int) -> torch.Tensor:
    """Greedy decoding as its definition says."""
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat((ids, model(ids)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids


class Plain(nn.Module):
    """The same model to somebody who knows nothing of caches."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids)


class Counter(nn.Module):
    """Counts to 20 and starts again."""

    def forward(self, ids):
        return nn.functional.one_hot((ids + 1) % 20, VOCABULARY).float()


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


def test_stop_strings():
    """A row stops with the token that completes a stop string."""
    model, prompt = decoder(), tokens(1, 5)
    full = by_hand(model, prompt, 10)
    letters = "".join(map(chr, range(65, 65 + VOCABULARY)))

    def to_text(ids):
        return "".join(letters[i] for i in ids)

    stop = to_text(full[0, 7:9].tolist())
    assert torch.equal(
        generate(model, prompt, max_new_tokens=10, stop_strings=[stop], to_text=to_text),
        full[:, :9],
    )


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


#
# -------------------------------------------------------------------------------------------------
# sampling


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


# -----------------------------------------------------------------------------------------------
# speculation


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
    expected = generate(model, prompt, max_new_tokens=30, **settings)
    for draft in (model, decoder(1), Plain(decoder(1)), "lookup"):
        run = generate_stream(
            model, prompt, max_new_tokens=30, draft=draft, draft_tokens=count, **settings
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


# ---------------------------------------------------------------------------------------------
# caches given


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
    """A windowed cache with sinks goes past the model's length; it refuses nothing and reads each
    token once.
    """
    model = decoder(max_length=16)
    cache = KVCache.for_model(model, window=12, sinks=2)
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


class Pair(nn.Module):
    """Scores two texts."""

    def forward(self, ids, other):
        return ids + other


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: zoo("t5")[0],
            "T5ForConditionalGeneration is an encoder-decoder, which generate doesn't support",
        ),
        (
            lambda: zoo("whisper")[0],
            "WhisperForConditionalGeneration is an encoder-decoder, which generate doesn't support",
        ),
        (
            lambda: nn.Transformer(8, 2, 1, 1, 8, batch_first=True),
            "Transformer is an encoder-decoder",
        ),
        (Pair, "the forward of Pair needs more than token ids: other"),
    ],
)
def test_models_that_do_not_continue_a_text_are_refused_by_name(model, message):
    """As the model and as a draft, before any work."""
    with pytest.raises(TypeError, match=message):
        generate(model(), tokens(1, 3), max_new_tokens=4)
    with pytest.raises(TypeError, match=message):
        generate(decoder(), tokens(1, 3), max_new_tokens=4, draft=model())


def test_results_are_ordinary_tensors():
    """Ids can go straight into a pass with gradients."""
    model = decoder()
    ids = generate(model, tokens(1, 4), max_new_tokens=3)
    model(ids).sum().backward()
    assert not ids.is_inference()


# --------------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": torch.zeros(1, 0, dtype=torch.long)}, r"prompt must be \[B, T\]"),
        ({"prompt": torch.zeros(3, dtype=torch.long)}, r"prompt must be \[B, T\]"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": [[1, 2], []]}, "prompt 1 must be a 1-D list"),
        ({"prompt": torch.tensor([[1, 61]])}, "prompt holds token id 61; allowed: 0 to 60"),
        ({"prompt": torch.tensor([[1, -1]])}, "prompt holds token id -1"),
        ({"prompt": tokens(1, 62)}, r"62 prompt tokens \+ 4 new ones pass the limit of 64"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 5}, "top_k can't do anything at temperature 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p is 1.1"),
        ({"temperature": 1.0, "min_p": 1.0}, "min_p is 1.0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"temperature": 1.0, "seed": [1, 2]}, "seed is .*one for each of 1 rows"),
        ({"stop_tokens": [61]}, "stop_tokens holds 61"),
        ({"stop_strings": ["a"]}, "stop_strings need to_text"),
        ({"stop_strings": [""], "to_text": str}, "stop_strings is"),
        ({"draft": "book"}, "draft is 'book'"),
        ({"draft": decoder(vocab_size=60)}, "the draft has 60 token ids and the model 61"),
        ({"draft_tokens": 3}, "draft_tokens is 3, but there is no draft"),
        ({"draft": "lookup", "draft_tokens": 0}, "draft_tokens is 0"),
    ],
)
def test_bad_input_is_named(changes, message):
    """Whatever is wrong is named with its value before any work, from `generate` and from the
    stream's first call.
    """
    model = decoder()
    model.register_forward_pre_hook(lambda *_: pytest.fail("work was done"))
    arguments = {"prompt": tokens(1, 5), "max_new_tokens": 4} | changes
    for function in (generate, generate_stream):
        with pytest.raises(ValueError, match=message):
            function(model, **arguments)


def test_wrong_types_are_named():
    """So are wrong types."""
    model = decoder()
    for prompt in (torch.zeros(1, 3), "text", None):
        with pytest.raises(TypeError, match="prompt must"):
            generate(model, prompt, max_new_tokens=3)
    with pytest.raises(TypeError, match="generate has no argument named temprature"):
        generate(decoder(), tokens(1, 3), max_new_tokens=4, temprature=1.0)
    with pytest.raises(TypeError, match="cache must be"):
        generate(model, tokens(1, 3), max_new_tokens=3, cache="yes")
    with pytest.raises(TypeError, match=r"Identity must map ids \[B, T\] to logits"):
        generate(nn.Identity(), tokens(1, 3), max_new_tokens=3)


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


# -------------------------------------------------------------------------------------------------
# text


@pytest.mark.parametrize("text", ["plain", "naïve façade, 日本語 \U0001f600!", "<s>a</s> b"])
def test_text_comes_out_as_it_went_in(text, tmp_path):
    """Streamed piece by piece, bytes and the ids of a tokenizer give what decoding all at once
    gives.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(sorted(alphabet))}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for reader, expected in (
        (Text(), text),
        (Text(tmp_path), tokenizer.decode(tokenizer.encode(text).ids)),
    ):
        printer = reader.printer()
        pieces = [printer(token) for token in reader.encode(text)]
        assert "".join(pieces) == expected
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    """No tokenizer.json: ValueError with the folder."""
    with pytest.raises(ValueError, match=f"{tmp_path} has no tokenizer.json"):
        Text(tmp_path)


# -------------------------------------------------------------------------------------------------
# kv_cache.py


@pytest.fixture
def script(monkeypatch):
    """The script `kv_cache.py` as a module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))
    return importlib.import_module("kv_cache")


@pytest.mark.slow
def test_the_script_shows_a_file(script, tmp_path, capsys):
    """The script streams the prompt's continuation, prints its tables and writes the plot and the
    numbers.
    """
    save(decoder(vocab_size=256, max_length=96), tmp_path / "model.pth")
    assert script.main(["--out", str(tmp_path), "--prompt", "def f(", "--max-new-tokens", "8"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("def f(") and "int8 cache" in shown and "all 64 of 64" in shown
    result = json.loads((tmp_path / "kv_cache.json").read_text())
    assert {row["way"] for row in result["rows"]} >= {
        "no cache",
        "cache",
        "int8 cache",
        "cache + speculative",
    }
    assert all(
        check["same_tokens"] == check["of"]
        for check in result["checks"]
        if check["way"] != "int8 cache"
    )
    assert (tmp_path / "kv_cache.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere.pth"], "nowhere.pth"),
        (["--prompt", ""], "prompt"),
        (["--max-new-tokens", "1000"], "pass the limit of 96"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--draft", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_the_script_names_mistakes_in_one_line(script, arguments, message, tmp_path, capsys):
    """A user's mistake is one line on standard error and exit code 2."""
    save(decoder(vocab_size=256, max_length=96), tmp_path / "model.pth")
    assert script.main(["--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kv_cache.py: error: ") and message in error and error.count("\n") == 1
