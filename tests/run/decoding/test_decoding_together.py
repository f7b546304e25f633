"""Several texts, each in a cache of its own, as one native pass."""

from __future__ import annotations

import pytest
import torch
from decoding_models import decoder

import quantize
from quantize.native import build
from quantize.run.decoding.native import Step
from quantize.run.decoding.together import read_together
from quantize.run.kv_cache import KVCache

pytestmark = [
    pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("compiled"),
]

LENGTHS = (1, 3, 270, 40, 600)
STEPS = 3


def compressed(kind: str) -> torch.nn.Module:
    model = decoder(width=48, max_length=1024)
    if kind == "int8":
        return quantize.quantize_dynamic(model, prefer="size")
    return quantize.to_half(model, torch.bfloat16) if kind == "bf16" else model


def filled(model: torch.nn.Module, length: int, **options: object) -> KVCache:
    """A cache of one row that holds a text of its own."""
    cache = KVCache.for_model(model, **options)
    ids = torch.arange(length)[None] * (length + 1) % 61
    model(ids, cache)
    return cache


@pytest.mark.parametrize("kind", ["fp32", "int8", "bf16"])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.int8}, {"window": 300}])
def test_each_row_is_what_it_is_alone(kind: str, options: dict) -> None:
    """Bit for bit, with caches of any lengths, at any number of rows."""
    model = compressed(kind)
    step = Step(model, narrow=False)
    with torch.no_grad():
        for rows in range(1, len(LENGTHS) + 1):
            lengths = LENGTHS[:rows]
            alone = [filled(model, length, **options) for length in lengths]
            together = [cache.fork() for cache in alone]
            for token in range(STEPS):
                tokens = torch.arange(rows) + token
                logits = read_together(step, tokens, together)
                expected = [
                    step(ids[None, None], cache, 1)[0]
                    for ids, cache in zip(tokens, alone, strict=True)
                ]
                assert logits is not None and torch.equal(logits, torch.cat(expected))
            assert [cache.length for cache in together] == [n + STEPS for n in lengths]


def test_what_native_code_cannot_read_is_left_alone() -> None:
    """Caches of two dtypes, an empty one, one of two rows: nothing is written."""
    model = decoder()
    step = Step(model)
    good = filled(model, 5)
    for other in (
        KVCache.for_model(model),
        filled(model, 5, dtype=torch.int8),
        KVCache.for_model(model, batch=2),
        filled(decoder(layers=1), 5),
    ):
        assert read_together(step, torch.tensor([1, 2]), [good, other]) is None
        assert good.length == 5
