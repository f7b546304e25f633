"""A text that is written step by step among others, with the tokens that `generate` gives alone.

It is `generate`'s own request, with its checks, its cache, its choice of tokens; only the loop is
outside: the prompt is read in the pieces in which `prefill` reads it, one piece a call, and each
next logits are handed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.models import DecoderLM
from quantize.run.decoding.passes import NativePasses
from quantize.run.decoding.recognition import multiplies_integers
from quantize.run.generate import Generation, prefill
from quantize.run.generate.reader import CHUNK, CachedReader
from quantize.run.kv_cache import KVCache
from quantize.run.serve.prefixes import Prefixes


@dataclass(frozen=True)
class Token:
    """A token that was chosen, and how probable it was.

    log_prob: under the model's own distribution. top: the most probable ids with their
    log-probabilities, if they were asked for. last: why the text ends here ("stop", "length"), or
    None.
    """

    id: int
    log_prob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    last: str | None = None


class Sequence(Generation):
    """A request for one text.

    Args:
        model: as in `generate`.
        prompt: token ids.
        prefixes: prompts read before.
        passes: native ones of the model, which texts share; None: the text makes its own.
        top: how many of the most probable tokens come along with each; None: no probabilities.
        options: those of `generate`, for one row.

    Raises:
        ValueError or TypeError: as `generate`.
    """

    def __init__(
        self,
        model: nn.Module,
        prompt: list[int],
        *,
        prefixes: Prefixes | None = None,
        passes: NativePasses | None = None,
        top: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, torch.tensor([prompt], dtype=torch.int64), **options)
        self.prefixes, self.top = prefixes, top
        if passes is not None:
            self._reader.passes = passes
        self._natively = isinstance(model, DecoderLM) and multiplies_integers(model)
        self.cancelled = False
        self._read, self._first = 0, self.ids.shape[1]
        self._logits: Tensor | None = None  # [1, V] after the prompt

    @property
    def cache(self) -> KVCache | None:
        """What holds the text read so far, if anything does."""
        return self._reader.cache if isinstance(self._reader, CachedReader) else None

    @property
    def reading(self) -> bool:
        """Whether a part of the prompt is still to be read."""
        return self._logits is None

    @torch.no_grad()
    def read_piece(self) -> int:
        """Read the next piece of the prompt; returns how many tokens that was."""
        reader = self._reader
        if not isinstance(reader, CachedReader):
            self._logits = reader.read(self.ids, last=1)[:, -1]
            return self._first
        if self._read == 0 and self._take_prefix(reader):
            return 0
        piece = self.ids[:, self._read : min(self._read + CHUNK, self._first)]
        if self._natively:
            logits = reader.read(piece, last=1)[:, -1]
        else:  # as `generate` reads it: a short last piece, too, by the model's own layers
            logits = prefill(self.model, piece, reader.cache)
        self._read += piece.shape[1]
        if self._read == self._first:
            self._logits = logits
            if self.prefixes is not None:
                self.prefixes.keep(self.ids[0, : self._first], reader.cache, logits)
        return piece.shape[1]

    def first_token(self) -> Token:
        """The token after the prompt, once all of it is read."""
        assert self._logits is not None
        return self.take(self._logits)

    @torch.no_grad()
    def read_token(self) -> Tensor:
        """Logits [1, V] after the last token, read by itself."""
        return self._reader.read(self.ids[:, -1:], last=1)[:, -1]

    @torch.no_grad()
    def take(self, logits: Tensor) -> Token:
        """Choose from logits [1, V]. Raises ValueError where they aren't finite."""
        token = self._choose(logits, self.ids.shape[1], self._seen)
        self._keep(token, logits)
        chosen = int(token)
        last = "stop" if bool(self._done) else None
        if last is None and self.ids.shape[1] - self._first >= self.max_new_tokens:
            last = "length"
        if self.top is None:
            return Token(chosen, last=last)
        scores = torch.log_softmax(logits[0].float(), dim=-1)
        best = scores.topk(min(self.top, len(scores)))
        top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return Token(chosen, float(scores[chosen]), tuple(top), last)

    def _take_prefix(self, reader: CachedReader) -> bool:
        """Take over what is kept of the prompt; whether that is all of it."""
        found = None
        if self.prefixes is not None:
            # Integer layers give the same bits however a prompt is cut.
            piece = 1 if self._natively else CHUNK
            found = self.prefixes.find(self.ids[0], reader.cache, piece)
        if found is None:
            return False
        reader.cache, self._read = found.cache, found.cache.length
        self._logits = found.logits
        return found.logits is not None
