"""Text of a prompt and of a continuation: bytes, and the ids of a tokenizer."""

from __future__ import annotations

import pytest

from quantize.run.generate.text import Text


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
