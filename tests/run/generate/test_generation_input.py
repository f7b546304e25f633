"""What `generate` refuses by name, before any work."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from generate_models import VOCABULARY
from helpers import decoder, tokens, zoo
from torch import nn

import quantize
from quantize.run.generate import generate, generate_stream


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


def masked_language_model() -> nn.Module:
    """A BERT, whose tokens see those after them."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(config).eval()


@pytest.mark.parametrize("prompt", [tokens(1, 3), [[1, 2, 3], [4, 5]]])
def test_models_that_are_not_causal_are_refused_by_name(prompt):
    """A text that was written from both sides never comes out, whatever the form of the prompt,
    at once or token by token.
    """
    message = "BertForMaskedLM isn't causal: the logits of position 2 changed"
    with pytest.raises(TypeError, match=message):
        generate(masked_language_model(), prompt, max_new_tokens=4)
    stream = generate_stream(masked_language_model(), prompt, max_new_tokens=4)
    next(stream)
    with pytest.raises(TypeError, match=message):
        next(stream)


def test_causal_models_are_not_refused_for_their_rounding():
    """In 16 bits, and with one step for all rows, logits of a position change as a text goes on."""
    causal = zoo("gpt2")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        one_step = torch.ao.quantization.quantize_dynamic(causal)
    for model in (quantize.to_half(causal), one_step, causal.bfloat16()):
        assert len(generate(model, [[1], [2, 3]], max_new_tokens=4)[0]) == 5


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
        ({"temperature": None}, "temperature is None"),
        ({"top_k": 5}, "top_k can't do anything at temperature 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p is 1.1"),
        ({"temperature": 1.0, "min_p": 1.0}, "min_p is 1.0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"temperature": 1.0, "seed": [1, 2]}, "seed is .*one for each of 1 rows"),
        ({"stop_tokens": [61]}, "stop_tokens holds 61"),
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


class LastLogits(nn.Module):
    """Gives logits of the last position only, and a loss, as nanoGPT does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = decoder()

    def forward(self, ids, targets=None):
        return self.inner(ids)[:, [-1]], None


def test_a_tuple_that_begins_with_logits():
    """It is read; texts of different lengths need logits of all positions, and say so."""
    model, prompt = LastLogits().eval(), tokens(2, 5)
    expected = generate(model.inner, prompt, max_new_tokens=4, stop_tokens=())
    assert torch.equal(generate(model, prompt, max_new_tokens=4, stop_tokens=()), expected)
    with pytest.raises(TypeError, match="LastLogits gives logits of 1 positions for 5 ids"):
        generate(model, [prompt[0], prompt[1, :3]], max_new_tokens=4)
