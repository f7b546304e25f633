"""A model that reads tokens: through a cache, each once, or without one, all of them again for
every new token.

Both readers have the same three calls, so that the loop above them, drafts included, doesn't know
which it has: `read` the tokens that follow, `truncate` to take some back, `length` of what was
read.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantize import check
from quantize.models import DecoderLM
from quantize.nn import holds_integers
from quantize.run.decoding import DecodingLM
from quantize.run.decoding.passes import NativePasses
from quantize.run.decoding.recognition import multiplies_integers
from quantize.run.kv_cache import KVCache

CHUNK = (
    512  # positions per pass while reading a prompt: bounds the memory of scores and activations
)
LONG_TEXT = 1024  # tokens from which a cache takes as long to read as a part of the weights


def prefill(model: nn.Module, ids: Tensor, cache: KVCache, *, chunk: int = CHUNK) -> Tensor:
    """Read prompt ids [B, T] into `cache`, `chunk` positions per pass; returns logits [B, V] of the
    last position.
    """
    check.count("chunk", chunk)
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise ValueError(f"ids must be [B, T] with T >= 1, got {tuple(ids.shape)}")
    for piece in ids.split(chunk, dim=1):
        logits = _call(model, piece, cache=cache, last=1)
    return logits[:, -1]


def decode(model: nn.Module, token: Tensor, cache: KVCache) -> Tensor:
    """Read one token per row [B] into `cache`; returns logits [B, V]."""
    return _call(model, token[:, None], cache=cache, last=1)[:, -1]


def takes_cache(model: nn.Module) -> bool:
    """Whether `model` can use a `KVCache`: its forward takes a `cache` and its attention modules
    say their shape.
    """
    return "cache" in _parameters(model) and any(hasattr(m, "cache_shape") for m in model.modules())


def default_dtype(model: nn.Module, length: int) -> torch.dtype | None:
    """Of a cache for a text of `length` tokens: int8 for long ones of a `DecoderLM`, whose native
    passes read it as it is; None for that of the keys.
    """
    decodes = isinstance(model, DecoderLM | DecodingLM)
    return torch.int8 if decodes and length >= LONG_TEXT else None


def check_continues(model: nn.Module) -> None:
    """Raises TypeError for a model that doesn't continue a text from its token ids alone."""
    kind = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or isinstance(
        model, nn.Transformer
    ):
        raise TypeError(
            f"{kind} is an encoder-decoder, which generate doesn't support: it continues a text "
            f"with a model that maps "
            f"ids [B, T] to logits [B, T, V]; use {kind}'s own generate, if it has one"
        )
    missing = _required(model)
    if missing:
        raise TypeError(f"the forward of {kind} needs more than token ids: {', '.join(missing)}")


def check_is_causal(model: nn.Module, before: Tensor, after: Tensor, position: int) -> None:
    """Raises TypeError for a model whose logits [B, V] of a position differ before and after a text
    went on.
    """
    change = (after.float() - before.float()).square().mean().sqrt()
    if bool(change > _tolerance(model) * before.float().std()):
        raise TypeError(
            f"{type(model).__name__} isn't causal: the logits of position {position} changed when "
            f"a token was added after it. generate continues a text with a model in which a token "
            f"sees only those before it (a BERT's config: is_decoder=True)"
        )


def _tolerance(model: nn.Module) -> float:
    """How much rounding may change logits, as a share of their spread: a product of another number
    of rows adds up in another order, and activations may be rounded with one step for all rows.
    """
    floats = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()}
    rounds = bool(floats - {torch.float32, torch.float64}) or torch.is_autocast_enabled("cpu")
    return 0.1 if rounds or any(map(holds_integers, model.modules())) else 1e-4


def vocabulary_size(model: nn.Module) -> int | None:
    """Number of token ids, from the config or the largest embedding; None if there is neither."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return size if isinstance(size, int) else max(sizes, default=None)


class CachedReader:
    """Reads through a cache. What was read is noted on the cache, so that a later text with the
    same beginning reuses it.

    A `DecoderLM` in eval mode is read natively where it can be (see `decoding.passes`). tokens: how
    many will be decoded.
    """

    def __init__(self, model: nn.Module, cache: KVCache, *, tokens: int):
        self.model, self.cache = model, cache
        self.passes = _native_passes(model, tokens)
        self._ran = False  # whether native code ran the last pass, and so had checked the model

    @property
    def reason(self) -> str | None:
        """Why the model runs its passes by itself; None if native code runs them, or will when they
        come.
        """
        if self.passes is not None:
            return self.passes.reason
        if isinstance(self.model, DecodingLM):
            return self.model.reason if self.model.backend != "native" else None
        kind = type(self.model).__name__
        return (
            f"{kind} is in training mode"
            if isinstance(self.model, DecoderLM)
            else f"{kind} isn't a DecoderLM"
        )

    @property
    def length(self) -> int:
        return self.cache.length

    def check(self, batch: int) -> None:
        """Raises ValueError if the cache belongs to another model or batch, or holds text that
        wasn't noted.
        """
        cache = self.cache
        parts: list[Any] = [m for m in self.model.modules() if hasattr(m, "cache_shape")]
        shapes = [part.cache_shape[:2] for part in parts]
        if shapes != cache.shapes:
            raise ValueError(
                f"the cache was made for another model: its layers hold {cache.shapes} (heads, "
                f"width), not {shapes}"
            )
        if cache.batch != batch:
            raise ValueError(
                f"the cache holds {cache.batch} rows and the prompt has {batch}: call "
                f"cache.reset(batch={batch})"
            )
        if cache.length and (cache.owner is None or cache.owner() is not self.model):
            raise ValueError(
                f"the cache holds {cache.length} positions that this model didn't write: call "
                f"cache.reset()"
            )
        if cache.length and (cache.tokens is None or cache.tokens.shape[1] != cache.length):
            raise ValueError(
                f"the cache holds {cache.length} positions that `generate` didn't write: call "
                f"cache.reset()"
            )

    def resume(self, ids: Tensor) -> Tensor:
        """Keep what the cache holds of `ids` [B, T] and drop the rest; returns what is left to
        read, at least one position.
        """
        cache = self.cache
        if cache.length and cache.tokens is not None:
            reach = min(cache.length, ids.shape[1] - 1)
            same = (cache.tokens[:, :reach] == ids[:, :reach]).all(0)
            cache.truncate(int(same.cumprod(0).sum()))
        return ids[:, cache.length :]

    def read(self, ids: Tensor, *, last: int, unchanged: bool = False) -> Tensor:
        """Logits [B, last, V] after reading ids [B, n] >= last. unchanged: see `NativePasses`."""
        held = self.cache.tokens if self.cache.length else None
        logits = None
        if self.passes is not None:
            checked = unchanged and self._ran
            logits = self.passes(ids, self.cache, last, unchanged=checked)
            self._ran = logits is not None
        if logits is None and ids.shape[1] > CHUNK and last == 1:
            logits = prefill(self.model, ids, self.cache)[:, None]
        elif logits is None:
            logits = _call(self.model, ids, cache=self.cache, last=last)
        self.cache.owner = weakref.ref(self.model)
        self.cache.tokens = ids if held is None else torch.cat((held, ids), dim=1)
        return logits[:, -last:]

    def truncate(self, length: int) -> None:
        self.cache.truncate(length)


class PlainReader:
    """Computes everything again for each new token.

    A `DecoderLM` of integer weights is read natively, so that its text doesn't depend on the cache.
    For others, rows of different length are padded on the right, which causal models, the only ones
    that make sense here, never look at.
    """

    reason = "there is no cache"  # see CachedReader

    def __init__(self, model: nn.Module, pad: Tensor | None):
        self.model, self.pad = model, pad
        self.ids: Tensor | None = None
        self.before: Tensor | None = None  # logits of the last position, until they are seen again
        self.is_causal = False
        self.passes: NativePasses | None = None
        if isinstance(model, DecoderLM) and multiplies_integers(model):
            self.passes = _native_passes(model, 1)

    @property
    def length(self) -> int:
        return 0 if self.ids is None else self.ids.shape[1]

    def read(self, ids: Tensor, *, last: int, unchanged: bool = False) -> Tensor:
        self.ids = ids if self.ids is None else torch.cat((self.ids, ids), dim=1)
        logits = self._read_natively(last)
        if logits is not None:
            return logits
        new = ids.shape[1]
        wanted = last if self.before is None else max(last, new + 1)
        logits = self._read_all(self.ids, last, wanted)
        if self.before is not None and logits.shape[1] > new:
            check_is_causal(self.model, self.before, logits[:, -new - 1], self.length - new - 1)
            self.is_causal = True
        self.before = None if self.is_causal else logits[:, -1]
        return logits[:, -last:]

    def _read_all(self, ids: Tensor, least: int, wanted: int) -> Tensor:
        """Logits of the `wanted` last positions where the model gives so many, `least` at least."""
        if self.pad is None:
            by_number = "logits_to_keep" in _parameters(self.model)
            return _call(self.model, ids, last=wanted if by_number else least)
        pad = self.pad.to(ids.device)[:, None]
        slots = torch.arange(self.length, device=ids.device)
        rolled = ids.gather(1, (slots + pad) % self.length)  # padding moves to the right
        logits = _call(self.model, rolled)
        places = slots[-wanted:] - pad  # [B, wanted]
        return logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1]))

    def _read_natively(self, last: int) -> Tensor | None:
        """Logits of the whole text, whose keys and values are dropped; None if the model has to run
        itself.
        """
        if self.passes is None or self.ids is None:
            return None
        scratch = KVCache.for_model(self.model, batch=self.ids.shape[0])
        scratch.reset(pad=self.pad)
        return self.passes(self.ids, scratch, last)

    def truncate(self, length: int) -> None:
        if self.ids is not None:
            self.ids = self.ids[:, :length]
            self.before = None


def _native_passes(model: nn.Module, tokens: int) -> NativePasses | None:
    """Native passes of a `DecoderLM` in eval mode. tokens: how many will be decoded."""
    if type(model) is DecodingLM:
        has_hooks = model._forward_hooks or model._forward_pre_hooks
        return None if has_hooks else model.native_passes()
    if not isinstance(model, DecoderLM) or any(module.training for module in model.modules()):
        return None
    return NativePasses(model, tokens=tokens)


def _parameters(model: nn.Module) -> frozenset[str]:
    """Names of the arguments of the model's forward."""
    forward = model.forward
    return _names(getattr(forward, "__func__", forward))


def _required(model: nn.Module) -> list[str]:
    """Names of the arguments without a default, after the first, that a forward asks for."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return []
    gathers = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters[1:] if p.default is p.empty and p.kind not in gathers]
    return [name for name in needed if name not in ("cache", "logits_to_keep", "use_cache")]


@functools.lru_cache(maxsize=64)  # asked for with every token, and slow to find
def _names(function: Callable[..., Any]) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # TorchScript methods have none
        return frozenset()


def _call(model: nn.Module, ids: Tensor, *, cache: KVCache | None = None, last: int = 0) -> Tensor:
    """Logits of a pass; `last` > 0 asks models that can for those of the last positions only."""
    known, options = _parameters(model), {}
    if cache is not None:
        options["cache"] = cache
    if last and "logits_to_keep" in known:
        options["logits_to_keep"] = last
    if "use_cache" in known:
        options["use_cache"] = False
    output = model(ids, **options)
    first = output[0] if isinstance(output, tuple) and output else output
    logits = first if isinstance(first, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[0] != ids.shape[0]:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise TypeError(
            f"{type(model).__name__} must map ids [B, T] to logits [B, T, V], got {found}"
        )
    if logits.shape[1] < (last or ids.shape[1]):
        raise TypeError(
            f"{type(model).__name__} gives logits of {logits.shape[1]} positions for "
            f"{ids.shape[1]} ids: drafts and prompts of different lengths need those of more"
        )
    return logits
