"""One token of each of several texts, every text in a cache of its own, as one pass of native code.

What a server needs: texts join and leave between passes, and no cache is moved or padded for it.
Each row is computed as it would be alone, bit for bit: products add up a row at a time, and a row's
attention runs over its own cache in the same chunks.

Left out: rows of several tokens, and rows beyond MOST_ROWS, which the caller splits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from quantize.run.decoding.caches import view_of
from quantize.run.decoding.native import Step, widened
from quantize.run.decoding.recognition import KINDS
from quantize.run.decoding.structs import Held, Pass
from quantize.run.kv_cache import KVCache


def read_together(step: Step, tokens: Tensor, caches: Sequence[KVCache]) -> Tensor | None:
    """Read one token into each cache.

    Args:
        step: of the model that wrote the caches.
        tokens: int64 [B], one for each cache, B <= MOST_ROWS.
        caches: of one row each and of one dtype, none of them empty.

    Returns:
        Logits [B, V]; None, with the caches as they were, where native code can't run the pass.
    """
    layers, rows = len(step.shapes), len(caches)
    held = (Held * (rows * layers))()
    kinds: set[torch.dtype] = set()
    for row, cache in enumerate(caches):
        fits = cache.length and cache.batch == 1 and cache.pad is None
        view = view_of(cache, step.shapes, 1) if fits else None
        if view is None:
            return None
        size = ctypes.sizeof(view.held)
        ctypes.memmove(ctypes.addressof(held) + row * size, view.address, size)
        kinds.add(view.dtype)
    if len(kinds) != 1:
        return None
    embedded = step.embed(tokens[:, None])
    if embedded is None:
        return None
    x = widened(embedded)
    logits = torch.empty(rows, step.vocabulary, dtype=torch.float32, device="cpu")
    lengths = torch.tensor([cache.length for cache in caches], dtype=torch.int64, device="cpu")
    request = Pass(
        batch=rows,
        tokens=1,
        keep=1,
        kind=KINDS[kinds.pop()],
        threads=step.threads,
        lengths=lengths.data_ptr(),
        held=ctypes.addressof(held),
        x=x.data_ptr(),
        logits=logits.data_ptr(),
    )
    step.run(step.described, request)
    for cache in caches:
        cache.close(1)
    return logits.to(step.answers or embedded.dtype)
