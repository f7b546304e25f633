"""Between text and token ids: bytes, or what a folder's tokenizer.json says."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from pathlib import Path


class Text:
    """Encodes a prompt, and turns ids into text as they come.

    Args:
        folder: with a tokenizer.json; None: a token is a byte, as in the models trained here.

    Raises:
        ValueError: no tokenizer.json in the folder, or no package that reads it.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.tokenizer = None
        if folder is None:
            return
        try:
            from tokenizers import Tokenizer
        except ImportError:
            extra = "uv sync --extra tokenizers"
            raise ValueError(
                f"reading tokenizer.json needs the tokenizers package: {extra}"
            ) from None
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{folder} has no tokenizer.json")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return list(text.encode()) if self.tokenizer is None else self.tokenizer.encode(text).ids

    def printer(self) -> Callable[[int], str]:
        """A function from each next id to the text that it completes, empty within a character."""
        if self.tokenizer is None:
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            return lambda token: decoder.decode(bytes([token]))
        from tokenizers.decoders import DecodeStream

        tokenizer, stream = self.tokenizer, DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(tokenizer, token) or ""
