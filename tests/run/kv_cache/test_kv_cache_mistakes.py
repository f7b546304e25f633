"""Bad input is named and harmless, and a failed pass leaves no trace."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, run, tokens, zoo
from kv_cache_models import Decoder, in_pieces, keep

from quantize.run.kv_cache import KVCache


def test_a_failed_pass_leaves_no_trace():
    """A pass that dies between two layers isn't counted, and the next one gives the right
    logits.
    """
    model, ids = Decoder(kv_heads=2), tokens(1, 12)
    cache = KVCache.for_model(model, limit=12, block=4)
    in_pieces(model, ids[:, :5], cache)
    hook = model.attention[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens(1, 7, seed=9), cache)
    hook.remove()
    assert cache.length == 5
    assert_close(in_pieces(model, ids[:, 5:], cache), run(model, ids)[:, 5:])


def test_bad_input_is_named_and_harmless():
    """Wrong layers, shapes, batches and lengths raise a ValueError that names them, and the cache
    still works.
    """
    model, ids = Decoder(kv_heads=2), tokens(1, 8)
    cache = KVCache.for_model(model, limit=8)
    in_pieces(model, ids[:, :4], cache)
    with pytest.raises(ValueError, match="don't fit a cache made for 1 rows"):
        model(tokens(2, 2), cache)
    with pytest.raises(ValueError, match="don't fit a cache made for 1 rows, 2 heads of width 8"):
        Decoder(kv_heads=4)(ids[:, :2], cache)
    with pytest.raises(ValueError, match="layer is 2; the cache has 2 layers"):
        keep(cache, 2, torch.zeros(1, 2, 1, 8))
    with pytest.raises(
        ValueError, match=r"4 positions held \+ 5 new ones pass the cache's limit of 8"
    ):
        model(tokens(1, 5), cache)
    with pytest.raises(ValueError, match="length is 9; allowed: 0 to the 4"):
        cache.truncate(9)
    with pytest.raises(ValueError, match="pad must be int64"):
        cache.reset(pad=torch.tensor([-1]))
    assert cache.length == 4
    assert_close(in_pieces(model, ids[:, 4:], cache), run(model, ids)[:, 4:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"kv_heads": [1]}, r"kv_heads is \[1\]; allowed: an integer >= 1, or 2"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"limit": None}, "needs a window"),
        ({"dtype": torch.int32}, "dtype is torch.int32"),
        ({"window": 0}, "window is 0"),
        ({"batch": True}, "batch is True"),
    ],
)
def test_bad_shapes_are_named(arguments, message):
    """Each constructor argument out of range is named with its value."""
    with pytest.raises(ValueError, match=message):
        KVCache(**{"layers": 2, "kv_heads": 2, "head_dim": 8, "limit": 16} | arguments)


def test_a_model_without_cache_support_is_refused():
    """`for_model` says so when a model has no attention that knows the cache."""
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no attention layers"):
        KVCache.for_model(zoo("gpt2")[0])
