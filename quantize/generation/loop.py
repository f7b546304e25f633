"""`generate` and `generate_stream`: check everything, read the prompt, then guess, read and choose until done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from quantize.generation.drafts import LookupDraft, ModelDraft, Pace
from quantize.generation.reader import CachedReader, PlainReader, check_continues, device_of, takes_cache, vocabulary_size
from quantize.generation.sampling import Chooser, Sampling
from quantize.kv_cache import KVCache

Prompt = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]


def generate(
    model: nn.Module,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    cache: bool | torch.dtype | KVCache = True,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] | None = None,
    stop_tokens: int | Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    to_text: Callable[[list[int]], str] | None = None,
    draft: nn.Module | str | None = None,
    draft_tokens: int | None = None,
    log_probs: bool = False,
) -> Tensor | list[Tensor] | tuple[Tensor | list[Tensor], Tensor]:
    """Continue a prompt: ids [B, T] (integers) -> ids [B, T + new], the prompt included, new <= max_new_tokens.

    model: maps ids [B, T] to logits [B, T, V], or to an object with `.logits`. prompt: a tensor [B, T], or a list of B texts of
    any length (1-D tensors or lists of ids), which gives a list of B 1-D tensors.

    cache: True uses a key-value cache if the model can and computes everything again for each token if it can't; False never
    uses one; a dtype (torch.int8, torch.bfloat16) is that of the cache; a `KVCache` is used as it is, and what it holds of the
    prompt from an earlier call isn't read again (a windowed one lets the text grow past the model's length).

    temperature, top_k, top_p, min_p, repetition_penalty, seed: see `sampling.Sampling`; greedy by default.

    A row stops after one of `stop_tokens` (default: the model's own end-of-text id, if its config has one; () for none), which
    is kept, or after one of `stop_strings`, which need `to_text` (ids -> str). In a tensor, rows that stopped early are filled
    with their last token.

    draft: a smaller model with the same vocabulary, or "lookup" to guess from the text itself (one row): faster where guesses
    are right, the same tokens in any case. draft_tokens: guesses per pass; None follows measured times and switches off where
    it doesn't pay.

    log_probs: also return the log-probability of each new token under the model's own distribution (before temperature and
    limits), fp32 [B, new]; 0 where a row had stopped.

    Raises ValueError or TypeError, naming what is wrong, before any work: an empty prompt, ids out of range, a text that would
    pass the model's or the cache's limit, settings that contradict each other, a draft with another vocabulary, a cache of
    another model or batch. Raises ValueError for logits that aren't finite.
    """
    run = generate_stream(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        cache=cache,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop_tokens=stop_tokens,
        stop_strings=stop_strings,
        to_text=to_text,
        draft=draft,
        draft_tokens=draft_tokens,
        log_probs=log_probs,
    )
    for _ in run:
        pass
    return (run.result, run.log_probs) if log_probs else run.result


def generate_stream(model: nn.Module, prompt: Prompt, *, max_new_tokens: int, **options: object) -> Generation:
    """`generate`, token by token: an iterator of int64 [B], one id per row, as soon as each is known.

    Takes the arguments of `generate` and checks them at once, before the first token is asked for.
    """
    return Generation(model, prompt, max_new_tokens=max_new_tokens, **options)


class Generation:
    """A request under way. Iterate for tokens [B]; `ids`, `result`, `log_probs`, `drafted`, `accepted` say what came so far."""

    def __init__(
        self,
        model: nn.Module,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        cache: bool | torch.dtype | KVCache = True,
        stop_tokens: int | Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        to_text: Callable[[list[int]], str] | None = None,
        draft: nn.Module | str | None = None,
        draft_tokens: int | None = None,
        log_probs: bool = False,
        **sampling: object,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        check_continues(model)
        for name, value in (("max_new_tokens", max_new_tokens), ("draft_tokens", 1 if draft_tokens is None else draft_tokens)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; allowed: an integer >= 1")
        self.model, self.max_new_tokens, self._device = model, max_new_tokens, device_of(model)
        self._ragged = not isinstance(prompt, Tensor)
        ids, pad = _as_ids(prompt)
        self.ids, self._pad = ids.to(self._device), pad
        self._vocabulary = vocabulary_size(model)
        self._check_ids("prompt", self.ids)
        self.prompt_length, self.batch = self.ids.shape[1], self.ids.shape[0]
        self._stop = torch.tensor(self._stop_tokens(stop_tokens), dtype=torch.int64, device=self._device)
        self._stop_strings, self._to_text = _as_strings(stop_strings), to_text
        if self._stop_strings and to_text is None:
            raise ValueError("stop_strings need to_text, a function from a list of ids to text")

        self.settings = Sampling(**sampling)
        self._choose = Chooser(self.settings, self.batch)
        self._reader = self._open(model, cache)
        self._draft = self._open_draft(draft, draft_tokens)
        self._pace = Pace(draft_tokens)
        self._seen: Tensor | None = None
        self._wants_log_probs, self._log_probs = log_probs, []
        self._done = torch.zeros(self.batch, dtype=torch.bool, device=self._device)
        self._ends = [None] * self.batch  # where each row that stopped ends
        self.drafted = self.accepted = 0
        self._tokens = self._run()

    # ------------------------------------------------------------------------------------- what came so far

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Tensor:
        with torch.no_grad():  # inference mode would mark the ids, and what modules keep, as unusable outside it
            return next(self._tokens)

    @property
    def result(self) -> Tensor | list[Tensor]:
        """Prompt and new tokens in the form the prompt had: ids [B, T + new], or a list of B 1-D tensors without padding."""
        if not self._ragged:
            return self.ids
        pads = [0] * self.batch if self._pad is None else self._pad.tolist()
        return [row[p:e] for row, p, e in zip(self.ids, pads, self._ends, strict=True)]

    @property
    def log_probs(self) -> Tensor:
        """Log-probabilities of the new tokens, fp32 [B, new]; asked for with `log_probs=True`."""
        if not self._log_probs:
            return torch.zeros(self.batch, 0, dtype=torch.float32, device=self._device)
        return torch.stack(self._log_probs, dim=1)

    @property
    def reason(self) -> str | None:
        """Why native code doesn't run the passes over a few tokens; None if it does, or will when they come."""
        return self._reader.reason

    # ------------------------------------------------------------------------------------------ the loop

    def _run(self):
        reader = self._reader
        todo = reader.resume(self.ids) if isinstance(reader, CachedReader) else self.ids
        if self._choose.penalty != 1:
            self._seen = self._tokens_seen()
        limit = self.prompt_length + self.max_new_tokens
        guesses, draft_s, started = self.ids[:, :0], 0.0, time.perf_counter()
        first = True
        while self.ids.shape[1] < limit and not bool(self._done.all()):
            if not first:
                guesses, draft_s = self._guess(limit)
                started = time.perf_counter()
                todo = torch.cat((self.ids[:, -1:], guesses), dim=1)
            logits = reader.read(todo, last=guesses.shape[1] + 1)  # [B, guesses + 1, V]
            right = 0
            for i in range(logits.shape[1]):
                token = self._choose(logits[:, i], self.ids.shape[1], self._seen)
                token = torch.where(self._done, self.ids[:, -1], token)
                self._keep(token, logits[:, i])
                hit = i < guesses.shape[1] and bool(((token == guesses[:, i]) | self._done).all())
                right += hit
                yield token
                if not hit or bool(self._done.all()):
                    break
            if guesses.shape[1]:
                reader.truncate(min(reader.length, self.ids.shape[1] - 1))
                self.drafted, self.accepted = self.drafted + guesses.shape[1], self.accepted + right
            if self._draft and not first:
                self._pace.record(guesses.shape[1], right, draft_s, time.perf_counter() - started)
            first = False

    def _guess(self, limit: int) -> tuple[Tensor, float]:
        """Guesses [B, n], never past the end, and the seconds they took."""
        count = min(self._pace.length(), limit - self.ids.shape[1] - 1) if self._draft else 0
        if count <= 0:
            return self.ids[:, :0], 0.0
        started = time.perf_counter()
        guesses = self._draft.propose(self.ids, count)
        return guesses, time.perf_counter() - started

    def _keep(self, token: Tensor, logits: Tensor) -> None:
        """Append one token per row; note its log-probability, and which rows stop with it."""
        self.ids = torch.cat((self.ids, token[:, None]), dim=1)
        if self._wants_log_probs:
            scores = torch.log_softmax(logits.float(), dim=-1).gather(-1, token[:, None])[:, 0]
            self._log_probs.append(scores.masked_fill(self._done, 0.0))
        if self._seen is not None:
            self._seen.scatter_(1, token[:, None], True)
        stops = torch.isin(token, self._stop) if len(self._stop) else torch.zeros_like(self._done)
        if self._stop_strings:
            ends = [self._ends_with_string(row) for row in self.ids]
            stops = stops | torch.tensor(ends, dtype=torch.bool, device=self._device)
        if bool(stops.any()):
            for row in (stops & ~self._done).nonzero().flatten().tolist():
                self._ends[row] = self.ids.shape[1]
            self._done = self._done | stops

    def _ends_with_string(self, row: Tensor) -> bool:
        """Whether a stop string stands in the text of the last new tokens; a character may take four byte-level tokens."""
        tail = 4 * max(map(len, self._stop_strings)) + 4
        text = self._to_text(row[self.prompt_length :][-tail:].tolist())
        return any(s in text for s in self._stop_strings)

    def _tokens_seen(self) -> Tensor:
        seen = torch.zeros(self.batch, self._vocabulary or int(self.ids.max()) + 1, dtype=torch.bool, device=self._device)
        for row, pad in enumerate([0] * self.batch if self._pad is None else self._pad.tolist()):
            seen[row, self.ids[row, pad:]] = True
        return seen

    # ----------------------------------------------------------------------------------- checks before work

    def _check_ids(self, name: str, ids: Tensor) -> None:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (self._vocabulary is not None and high >= self._vocabulary):
            wrong = low if low < 0 else high
            raise ValueError(f"{name} holds token id {wrong}; allowed: 0 to {(self._vocabulary or 2**63) - 1}")

    def _stop_tokens(self, given: int | Sequence[int] | None) -> list[int]:
        if given is None:
            for holder in ("generation_config", "config"):
                own = getattr(getattr(self.model, holder, None), "eos_token_id", None)
                if own is not None:
                    return [own] if isinstance(own, int) else list(own)
            return []
        stops = [given] if isinstance(given, int) else list(given)
        for token in stops:
            if not isinstance(token, int) or token < 0 or (self._vocabulary is not None and token >= self._vocabulary):
                raise ValueError(f"stop_tokens holds {token!r}; allowed: ids 0 to {(self._vocabulary or 2**63) - 1}")
        return stops

    def _open(self, model: nn.Module, cache: bool | torch.dtype | KVCache) -> CachedReader | PlainReader:
        total = self.prompt_length + self.max_new_tokens
        if not isinstance(cache, KVCache):
            limit = _model_limit(model)
            if limit is not None and total > limit:
                raise ValueError(
                    f"{self.prompt_length} prompt tokens + {self.max_new_tokens} new ones pass the limit of {limit} of "
                    f"{type(model).__name__}; for longer text give a KVCache with a window"
                )
        if cache is False or cache is None or (cache is True and not takes_cache(model)):
            return PlainReader(model, self._pad)
        if not takes_cache(model):
            raise ValueError(f"cache is {cache!r}, but {type(model).__name__} can't use one: its forward takes no `cache`")
        if isinstance(cache, KVCache):
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
        if cache is not True and not isinstance(cache, torch.dtype):
            raise TypeError(f"cache must be True, False, a dtype or a KVCache, got {cache!r}")
        made = KVCache.for_model(model, batch=self.batch, limit=total, dtype=None if cache is True else cache)
        made.reset(pad=self._pad)
        return CachedReader(model, made, tokens=self.max_new_tokens)

    def _open_draft(self, draft: nn.Module | str | None, count: int | None) -> ModelDraft | LookupDraft | None:
        if draft is None:
            if count is not None:
                raise ValueError(f"draft_tokens is {count}, but there is no draft")
            return None
        if isinstance(draft, str):
            if draft != "lookup" or self.batch != 1:
                raise ValueError(f"draft is {draft!r} for {self.batch} rows; allowed: a model, or 'lookup' for one row")
            return LookupDraft()
        if not isinstance(draft, nn.Module):
            raise TypeError(f"draft must be a model or 'lookup', got {type(draft).__name__}")
        check_continues(draft)
        other = vocabulary_size(draft)
        if other != self._vocabulary:
            raise ValueError(f"the draft has {other} token ids and the model {self._vocabulary}: they must share a vocabulary")
        reader = self._open(draft, True)
        return ModelDraft(reader, lambda logits, position: self._choose(logits, position))


def _model_limit(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    for name in ("max_length", "max_position_embeddings"):  # ours; those of transformers, whose max_length is no limit
        value = getattr(config, name, None)
        if isinstance(value, int) and (name != "max_length" or not hasattr(config, "max_position_embeddings")):
            return value
    return None


def _as_ids(prompt: Prompt) -> tuple[Tensor, Tensor | None]:
    """ids [B, T] and, for rows of different length, how many positions of each are empty on the left [B]."""
    if isinstance(prompt, Tensor):
        if prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
            raise TypeError(f"prompt must hold integer token ids, got {prompt.dtype}")
        if prompt.dim() != 2 or 0 in prompt.shape:
            raise ValueError(f"prompt must be [B, T] with at least one row and one token, got {list(prompt.shape)}")
        return prompt.long(), None
    if isinstance(prompt, str | bytes) or not isinstance(prompt, Sequence):
        raise TypeError(f"prompt must be ids [B, T] or a list of lists of ids, got {type(prompt).__name__}")
    rows = []
    for i, row in enumerate(prompt):
        if not isinstance(row, Tensor):
            row = torch.tensor(row if isinstance(row, Sequence) else [row], device="cpu")
        if row.dim() != 1 or not len(row) or row.is_floating_point():
            raise ValueError(f"prompt {i} must be a 1-D list of at least one token id, got {row.dtype} {list(row.shape)}")
        rows.append(row.long())
    if not rows:
        raise ValueError("prompt is an empty list; give at least one row")
    longest = max(map(len, rows))
    pad = torch.tensor([longest - len(row) for row in rows], device="cpu")
    ids = torch.stack([torch.nn.functional.pad(row, (int(p), 0)) for row, p in zip(rows, pad, strict=True)])
    return ids, pad if bool(pad.any()) else None


def _as_strings(strings: Sequence[str]) -> tuple[str, ...]:
    strings = (strings,) if isinstance(strings, str) else tuple(strings)
    if not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"stop_strings is {strings!r}; allowed: strings of at least one character")
    return strings
