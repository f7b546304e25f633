"""`generate` and `generate_stream`: check everything, read the prompt, then guess, read, choose."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantize import check
from quantize.run.generate.checks import (
    Prompt,
    as_ids,
    check_ids,
    check_length,
    stop_tokens_of,
)
from quantize.run.generate.drafts import LookupDraft, ModelDraft, Pace
from quantize.run.generate.reader import (
    CachedReader,
    PlainReader,
    check_continues,
    default_dtype,
    takes_cache,
    vocabulary_size,
)
from quantize.run.generate.sampling import Chooser, Sampling
from quantize.run.kv_cache import KVCache
from quantize.surgery import device_of


def generate(model: nn.Module, prompt: Prompt, **options: Any) -> Tensor | list[Tensor] | tuple:
    """Continue a prompt: ids [B, T] (integers) -> ids [B, T + new], the prompt included, new <=
    max_new_tokens.

    A `DecoderLM` on a CPU in eval mode is decoded by native code where there is a compiler (see
    `decoding.passes`), without a second copy of float weights. Compiling takes 6 s, once, and waits
    until a process has decoded 12000 tokens times layers without it. With float32 weights logits
    equal those of the model's own forward to rounding. Native code reads a model with int8 or int4
    weights from its first token on, and its text is the same with and without a cache of the
    model's dtype, alone and in a batch, with and without a draft, on any number of threads. The
    model's own forward rounds otherwise there: of two tokens that are nearly as probable, the other
    one may come. It runs where a model has hooks, is in training mode, or has foreign parts.

    Args:
        model: maps ids [B, T] to logits [B, T, V] (the last position's will do for prompts of one
            length and no draft), to a tuple that begins with them, or an object with `.logits`.
        prompt: a tensor [B, T], or a list of B texts of any length (1-D tensors or lists of ids),
            which gives a list of B 1-D tensors.
        max_new_tokens: an integer >= 1.
        cache: True uses a key-value cache if the model can (a `DecoderLM` one of int8 for texts of
            1024 tokens and more), else computes everything again for each token, as False always
            does; a dtype (torch.int8, torch.float32) is that of the cache; a `KVCache` is used as
            it is, and what it holds of the prompt isn't read again (a windowed one lets the text
            grow past the model's length).
        temperature, top_k, top_p, min_p, repetition_penalty, seed: see `sampling.Sampling`; greedy
            by default.
        stop_tokens: a row stops after one of these ids, which is kept. Default: the model's own
            end-of-text id, if its config has one; () for none. In a tensor, rows that stopped early
            are filled with their last token.
        draft: a smaller model with the same vocabulary, or "lookup" to guess from the text itself
            (one row): faster where guesses are right, the same tokens in any case.
        draft_tokens: guesses per pass; None follows measured times and switches off where guessing
            doesn't pay.
        log_probs: also return the log-probability of each new token under the model's own
            distribution (before temperature and limits), float32 [B, new]; 0 where a row had
            stopped.

    Returns:
        The ids in the form that the prompt had; with `log_probs`, these and the log-probabilities.

    Raises:
        ValueError or TypeError: before any work, naming what is wrong: an empty prompt, ids out of
            range, a text that would pass the model's or the cache's limit, settings that contradict
            each other, an encoder-decoder, a draft with another vocabulary, a cache of another
            model or batch.
        ValueError, TypeError: under way, for logits that aren't finite, a model that isn't causal.
    """
    run = Generation(model, prompt, **options)
    run.undisturbed = run._draft is None
    for _ in run:
        pass
    return (run.result, run.log_probs) if run.wants_log_probs else run.result


def generate_stream(model: nn.Module, prompt: Prompt, **options: Any) -> Generation:
    """`generate`, token by token.

    Args:
        model, prompt, max_new_tokens, cache: as `generate` takes them; all are checked at once.
        stop_tokens, draft, draft_tokens, log_probs: the same.
        temperature, top_k, top_p, min_p, repetition_penalty, seed: the same.

    Returns:
        An iterator of int64 [B], one id per row, as soon as each is known.

    Raises:
        TypeError, ValueError: as `generate`.
    """
    return Generation(model, prompt, **options)


class Generation:
    """A request under way, with the arguments of `generate`. Iterate for tokens [B].

    `ids`, `result`, `log_probs`, `drafted`, `accepted` say what came so far; `reason` why native
    code doesn't decode, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        cache: bool | torch.dtype | KVCache = True,
        stop_tokens: int | Sequence[int] | None = None,
        draft: nn.Module | str | None = None,
        draft_tokens: int | None = None,
        log_probs: bool = False,
        **sampling: Any,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        check_continues(model)
        check.count("max_new_tokens", max_new_tokens)
        if draft_tokens is not None:
            check.count("draft_tokens", draft_tokens)
        self.model, self.max_new_tokens, self._device = model, max_new_tokens, device_of(model)
        self._ragged = not isinstance(prompt, Tensor)
        ids, self._pad = as_ids(prompt)
        self.ids = ids.to(self._device)
        self._vocabulary = vocabulary_size(model)
        check_ids("prompt", self.ids, self._vocabulary)
        self.prompt_length, self.batch = self.ids.shape[1], self.ids.shape[0]
        self._stop = frozenset(stop_tokens_of(model, stop_tokens, self._vocabulary))
        self.settings = Sampling.of(sampling)
        self._choose = Chooser(self.settings, self.batch)
        self._reader = self._open(model, cache)
        self._draft = self._open_draft(draft, draft_tokens)
        self._pace = Pace(draft_tokens)
        self._seen = self._tokens_seen() if self._choose.penalty != 1 else None
        self.wants_log_probs, self._log_probs = log_probs, []
        self._done = torch.zeros(self.batch, dtype=torch.bool, device=self._device)
        self._ends: list[int | None] = [None] * self.batch  # where each row that stopped ends
        self.undisturbed = False  # whether no code but this package's runs between two tokens
        self.drafted = self.accepted = 0
        self._tokens = self._run()

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Tensor:
        # Inference mode would mark the ids, and what modules keep, as unusable outside it.
        with torch.no_grad():
            return next(self._tokens)

    @property
    def result(self) -> Tensor | list[Tensor]:
        """Prompt and new tokens in the prompt's form: ids [B, T + new], or B of 1-D, unpadded."""
        if not self._ragged:
            return self.ids
        spans = zip(self.ids, self._pads(), self._ends, strict=True)
        return [row[start:end] for row, start, end in spans]

    @property
    def log_probs(self) -> Tensor:
        """Log-probabilities of the new tokens, fp32 [B, new]; asked for with `log_probs=True`."""
        if not self._log_probs:
            return torch.zeros(self.batch, 0, dtype=torch.float32, device=self._device)
        return torch.stack(self._log_probs, dim=1)

    @property
    def reason(self) -> str | None:
        """Why native code doesn't run the passes; None if it does, or will when they come."""
        return self._reader.reason

    def _run(self) -> Iterator[Tensor]:
        yield from self._accept(self._read_prompt(), self.ids[:, :0])
        limit = self.prompt_length + self.max_new_tokens
        while self.ids.shape[1] < limit and None in self._ends:
            guesses, draft_s = self._guess(limit)
            started = time.perf_counter()
            todo = torch.cat((self.ids[:, -1:], guesses), dim=1)
            new = todo.shape[1]
            logits = self._reader.read(todo, last=new, unchanged=self.undisturbed)  # [B, new, V]
            right = yield from self._accept(logits, guesses)
            count = guesses.shape[1]
            if count:
                self._reader.truncate(min(self._reader.length, self.ids.shape[1] - 1))
                self.drafted, self.accepted = self.drafted + count, self.accepted + right
            if self._draft:
                self._pace.record(count, right, draft_s, time.perf_counter() - started)

    def _read_prompt(self) -> Tensor:
        """Logits [B, 1, V] after the prompt, of which a cache may hold a part."""
        reader = self._reader
        todo = reader.resume(self.ids) if isinstance(reader, CachedReader) else self.ids
        return reader.read(todo, last=1)

    def _accept(self, logits: Tensor, guesses: Tensor) -> Generator[Tensor, None, int]:
        """Choose a token at each position up to the first wrong guess; returns how many guesses
        were right.
        """
        right = 0
        for i in range(logits.shape[1]):
            token = self._choose(logits[:, i], self.ids.shape[1], self._seen)
            if any(self._ends):
                token = torch.where(self._done, self.ids[:, -1], token)
            self._keep(token, logits[:, i])
            hit = i < guesses.shape[1] and bool(((token == guesses[:, i]) | self._done).all())
            right += hit
            yield token
            if not hit or None not in self._ends:
                break
        return right

    def _guess(self, limit: int) -> tuple[Tensor, float]:
        """Guesses [B, n], never past the end, and the seconds they took."""
        count = min(self._pace.length(), limit - self.ids.shape[1] - 1)
        if self._draft is None or count <= 0:
            return self.ids[:, :0], 0.0
        started = time.perf_counter()
        guesses = self._draft.propose(self.ids, count)
        return guesses, time.perf_counter() - started

    def _keep(self, token: Tensor, logits: Tensor) -> None:
        """Append one token per row; note its log-probability, and which rows stop with it."""
        self.ids = torch.cat((self.ids, token[:, None]), dim=1)
        if self.wants_log_probs:
            scores = torch.log_softmax(logits.float(), dim=-1).gather(-1, token[:, None])[:, 0]
            self._log_probs.append(scores.masked_fill(self._done, 0.0))
        if self._seen is not None:
            self._seen.scatter_(1, token[:, None], True)
        for row, chosen in enumerate(token.tolist()):
            if self._ends[row] is None and chosen in self._stop:
                self._ends[row] = self.ids.shape[1]
                self._done[row] = True

    def _tokens_seen(self) -> Tensor:
        size = (self.batch, self._vocabulary or int(self.ids.max()) + 1)
        seen = torch.zeros(size, dtype=torch.bool, device=self._device)
        for row, pad in enumerate(self._pads()):
            seen[row, self.ids[row, pad:]] = True
        return seen

    def _pads(self) -> list[int]:
        """Empty positions at the left of each row."""
        return [0] * self.batch if self._pad is None else self._pad.tolist()

    def _open(
        self, model: nn.Module, cache: bool | torch.dtype | KVCache
    ) -> CachedReader | PlainReader:
        total = self.prompt_length + self.max_new_tokens
        if not isinstance(cache, KVCache):
            check_length(model, self.prompt_length, self.max_new_tokens)
        if cache is False or cache is None or (cache is True and not takes_cache(model)):
            return PlainReader(model, self._pad)
        if not takes_cache(model):
            raise ValueError(
                f"cache is {cache!r}, but {type(model).__name__} can't use one: its forward "
                f"takes no `cache`"
            )
        if isinstance(cache, KVCache):
            return self._reuse(model, cache, total)
        if cache is not True and not isinstance(cache, torch.dtype):
            raise TypeError(f"cache must be True, False, a dtype or a KVCache, got {cache!r}")
        dtype = default_dtype(model, total) if cache is True else cache
        made = KVCache.for_model(model, batch=self.batch, limit=total, dtype=dtype)
        made.reset(pad=self._pad)
        return CachedReader(model, made, tokens=self.max_new_tokens)

    def _reuse(self, model: nn.Module, cache: KVCache, total: int) -> CachedReader:
        """A reader with the caller's cache, which may hold a part of the prompt."""
        if cache.limit is not None and total > cache.limit:
            asked = f"{self.prompt_length} prompt tokens + {self.max_new_tokens} new ones"
            raise ValueError(f"{asked} pass the cache's limit of {cache.limit}")
        if cache.length and self._pad is not None:
            raise ValueError("rows of different length need an empty cache: call cache.reset()")
        reader = CachedReader(model, cache, tokens=self.max_new_tokens)
        reader.check(self.batch if cache.length else cache.batch)
        if cache.length == 0:
            cache.reset(batch=self.batch, pad=self._pad)
        return reader

    def _open_draft(
        self, draft: nn.Module | str | None, count: int | None
    ) -> ModelDraft | LookupDraft | None:
        if draft is None:
            if count is not None:
                raise ValueError(f"draft_tokens is {count}, but there is no draft")
            return None
        if isinstance(draft, str):
            if draft != "lookup" or self.batch != 1:
                raise ValueError(
                    f"draft is {draft!r} for {self.batch} rows; allowed: a model, or 'lookup' "
                    f"for one row"
                )
            return LookupDraft()
        if not isinstance(draft, nn.Module):
            raise TypeError(f"draft must be a model or 'lookup', got {type(draft).__name__}")
        check_continues(draft)
        other = vocabulary_size(draft)
        if other != self._vocabulary:
            raise ValueError(
                f"the draft has {other} token ids and the model {self._vocabulary}: they must "
                f"share a vocabulary"
            )
        reader = self._open(draft, True)
        return ModelDraft(reader, lambda logits, position: self._choose(logits, position))


def _show_arguments(*functions: Callable[..., object]) -> None:
    """Let `help` and editors show the arguments of `Generation` and `Sampling`, where alone they
    are written down.
    """
    own = inspect.signature(Generation).parameters.values()
    request = [p for p in own if p.kind is not p.VAR_KEYWORD]
    sampling = inspect.signature(Sampling).parameters.values()
    parameters = [*request, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in sampling)]
    for function in functions:
        returns = inspect.signature(function).return_annotation
        function.__signature__ = inspect.Signature(parameters, return_annotation=returns)


_show_arguments(generate, generate_stream)
