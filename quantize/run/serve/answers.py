"""Texts in the form of OpenAI's answers: completions and chat, whole or in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from quantize.run.serve.sequence import Token
from quantize.run.serve.served import Decoder
from quantize.run.serve.writing import Piece


class Answer:
    """What is made of the pieces of a request's texts.

    Args:
        about: its id, time and model.
        decoder: for the text of single tokens.
        choices: how many texts.
    """

    prefix = kind = chunk_kind = ""

    def __init__(self, about: dict[str, Any], decoder: Decoder, choices: int) -> None:
        self.about, self.decoder = about, decoder
        self._texts: list[list[str]] = [[] for _ in range(choices)]
        self._tokens: list[list[Token]] = [[] for _ in range(choices)]
        self._reasons: list[str | None] = [None] * choices
        self._lengths = [0] * choices  # characters that were sent of each text

    def add(self, piece: Piece) -> None:
        """Keep a piece for the whole answer."""
        self._texts[piece.choice].append(piece.text)
        self._tokens[piece.choice] += piece.tokens
        self._reasons[piece.choice] = piece.reason

    def whole(self) -> dict[str, Any]:
        """The answer of all pieces."""
        choices = []
        for index, parts in enumerate(self._texts):
            text, tokens = "".join(parts), self._tokens[index]
            choices.append(self._choice(index, text, tokens, self._reasons[index], whole=True))
        return {**self.about, "object": self.kind, "choices": choices}

    def opening(self) -> Iterator[dict[str, Any]]:
        """Chunks before the first piece."""
        return iter(())

    def part(self, piece: Piece) -> dict[str, Any]:
        """The chunk of one piece."""
        choice = self._choice(piece.choice, piece.text, piece.tokens, piece.reason, whole=False)
        self._lengths[piece.choice] += len(piece.text)
        return self.chunk([choice])

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk with these choices."""
        return {**self.about, "object": self.chunk_kind, "choices": choices}

    def _choice(
        self, index: int, text: str, tokens: list[Token], reason: str | None, *, whole: bool
    ) -> dict[str, Any]:
        raise NotImplementedError


class TextAnswer(Answer):
    """Of `/v1/completions`."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _choice(
        self, index: int, text: str, tokens: list[Token], reason: str | None, *, whole: bool
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": self._log_probs(tokens, self._lengths[index]),
            "finish_reason": reason,
        }

    def _log_probs(self, tokens: list[Token], offset: int) -> dict[str, Any] | None:
        if not tokens or tokens[0].log_prob is None:
            return None
        written = [self.decoder.token_text(token.id) for token in tokens]
        offsets = []
        for text in written:
            offsets.append(offset)
            offset += len(text)
        tops = [{self.decoder.token_text(i): p for i, p in token.top} for token in tokens]
        return {
            "tokens": written,
            "token_logprobs": [token.log_prob for token in tokens],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


class ChatAnswer(Answer):
    """Of `/v1/chat/completions`."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self._texts)):
            delta = {"role": "assistant", "content": ""}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            yield self.chunk([choice])

    def _choice(
        self, index: int, text: str, tokens: list[Token], reason: str | None, *, whole: bool
    ) -> dict[str, Any]:
        said: dict[str, Any] = {"content": text}
        if whole:
            said = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": index,
            "message" if whole else "delta": said,
            "logprobs": self._log_probs(tokens),
            "finish_reason": reason,
        }

    def _log_probs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if not tokens or tokens[0].log_prob is None:
            return None
        content = []
        for token in tokens:
            top = [self._described(i, p) for i, p in token.top]
            content.append({**self._described(token.id, token.log_prob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _described(self, token: int, log_prob: float | None) -> dict[str, Any]:
        text = self.decoder.token_text(token)
        return {"token": text, "logprob": log_prob, "bytes": list(text.encode())}
