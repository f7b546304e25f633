"""`for_decoding`: a `DecoderLM` whose passes over a few tokens run outside of Python.

At one token per pass, the arithmetic of a layer is a few short products that take as long as their weights take to arrive from
memory, and what surrounds them in eager PyTorch (a Python call per module and operation, kernels made for many rows) takes
longer. So such a pass runs as one call, with the model's own weights:

- `native`: C++ that reads each weight once at the speed of memory (step.cpp), compiled in seconds on the machine that decodes.
- `torchscript`: the pass of a single token as one traced graph of stock operations, for machines without a compiler.

Longer passes, and what a back end doesn't know, run as before: same weights, same answers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantize.decoding import native, torchscript
from quantize.kv_cache import KVCache
from quantize.models import DecoderLM

BACKENDS = ("native", "torchscript")


def for_decoding(model: DecoderLM, *, backend: str | None = None) -> DecodingLM:
    """`model`, compressed or not, ready for `generate`: the same ids to the same logits, faster for a few tokens.

    It shares the model's weights and follows no later change of the model. Not for training or saving; a CUDA model runs as it
    is. backend: "native" compiles a C++ file when first asked for (3 s; kept in the user's cache folder), "torchscript" traces
    a copy with merged layers. None takes native where there is a compiler and every layer is of a kind that it knows, else
    torchscript; `.backend` and `.reason` of the result say which and why.

    Raises TypeError for something else than a `DecoderLM`, ValueError for another back end, or for native where it can't run.
    """
    if not isinstance(model, DecoderLM):
        raise TypeError(f"for_decoding takes a DecoderLM, got {type(model).__name__}")
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend is {backend!r}; allowed: None, {', '.join(BACKENDS)}")
    obstacle = native.obstacle(model) if backend != "torchscript" else "asked for"
    if backend == "native" and obstacle:
        raise ValueError(f"backend 'native' can't run this model: {obstacle}")
    return DecodingLM(model, "torchscript" if obstacle else "native", obstacle)


class DecodingLM(nn.Module):
    """See `for_decoding`. Token ids [B, T] -> logits [B, T, V], or [B, logits_to_keep, V]."""

    def __init__(self, model: DecoderLM, backend: str, reason: str | None):
        super().__init__()
        self.config, self.backend, self.reason = model.config, backend, reason
        self.model = (torchscript.merged(model) if backend == "torchscript" else model).eval()
        self._step: native.Step | torchscript.Step | None = None

    def forward(self, ids: Tensor, cache: KVCache | None = None, logits_to_keep: int = 0) -> Tensor:
        if isinstance(cache, KVCache) and cache.length and ids.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            if self._step is None:
                self._step = (native if self.backend == "native" else torchscript).Step(self.model)
            if (logits := self._step(ids, cache, logits_to_keep)) is not None:
                return logits
        return self.model(ids, cache, logits_to_keep)

    def rope_frequencies(self) -> Tensor:
        return self.model.rope_frequencies()

    def _apply(self, fn, recurse=True):
        self._step = None  # it holds the tensors that are about to change
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_step": None}  # pointers and graphs can't be copied; the next pass makes them again
