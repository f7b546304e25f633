"""A decoder made ready for decoding against the one it was made from."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers import assert_close, run
from torch import nn

from quantize.decoding import DecodingLM, for_decoding, merge_linears
from quantize.generation import generate, generate_stream
from quantize.int4 import quantize_weights
from quantize.int8 import Int8Linear, quantize_dynamic
from quantize.kv_cache import KVCache
from quantize.low_rank import factorize_low_rank
from quantize.models import MLP, DecoderConfig, DecoderLM, MLPConfig
from quantize.precision import to_half

KINDS = {
    "fp32": lambda m: m,
    "fp16": to_half,
    "int8": quantize_dynamic,
    "int4": quantize_weights,
    "low rank": lambda m: factorize_low_rank(m, ratio=0.7),
    "low rank int8": lambda m: quantize_dynamic(factorize_low_rank(m, ratio=0.7)),
}


def decoder(**changes) -> DecoderLM:
    shape = {"vocab_size": 61, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_width": 48, "max_length": 64}
    torch.manual_seed(0)
    model = DecoderLM(DecoderConfig(**shape | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "qkv_bias": True, "tied_head": True}])
def test_same_logits_and_tokens(kind, changes):
    """Of every compressed kind, in one pass and token by token, growing past the first block, for one row and several."""
    model = KINDS[kind](decoder(**changes))
    fast = for_decoding(model)
    ids = tokens(2, 40)
    assert_close(run(fast, ids), run(model, ids))
    for batch in (1, 2):
        caches = [KVCache.for_model(m, batch=batch, block=8) for m in (model, fast)]
        for piece in ids[:batch, :35].split([5] + [1] * 30, dim=1):
            slow, quick = (run(lambda i, m=m, c=c: m(i, c), piece) for m, c in zip((model, fast), caches, strict=True))
            assert_close(quick, slow)
    assert torch.equal(generate(fast, ids[:, :5], max_new_tokens=50), generate(model, ids[:, :5], max_new_tokens=50))


@pytest.mark.parametrize(
    "options", [{"cache": torch.int8}, {"draft": "lookup", "draft_tokens": 3}, {"temperature": 1.0, "seed": 0}]
)
def test_everything_else_still_works(options):
    """Narrow caches, drafts and sampling give what the model itself gives."""
    model = decoder()
    expected = generate(model, tokens(1, 9), max_new_tokens=40, **options)
    assert torch.equal(generate(for_decoding(model), tokens(1, 9), max_new_tokens=40, **options), expected)


def test_ragged_rows_and_windows():
    """Rows of different length, and caches with a window, go around the graph."""
    model, prompts = decoder(), [tokens(3), tokens(7)]
    fast = for_decoding(model)
    for a, b in zip(generate(fast, prompts, max_new_tokens=9), generate(model, prompts, max_new_tokens=9), strict=True):
        assert torch.equal(a, b)
    windows = [KVCache.for_model(m, window=9, sinks=2) for m in (fast, model)]
    texts = [generate(m, tokens(1, 5), max_new_tokens=90, cache=c) for m, c in zip((fast, model), windows, strict=True)]
    assert torch.equal(*texts)


def test_the_limit_holds():
    """The graph doesn't write past the cache's limit."""
    model = for_decoding(decoder())
    cache = KVCache.for_model(model, limit=4)
    with torch.no_grad():
        model(tokens(1, 4), cache)
        with pytest.raises(ValueError, match=r"4 positions held \+ 1 new one"):
            model(tokens(1, 1), cache)


def test_the_model_is_untouched():
    """The model it was made from keeps its modules and weights, and shares what wasn't merged."""
    model = quantize_dynamic(decoder())
    before = {n: p.clone() for n, p in model.state_dict().items()}
    fast = for_decoding(model)
    list(generate_stream(fast, tokens(1, 3), max_new_tokens=3))
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert isinstance(fast, DecodingLM) and fast.model.blocks[0].ffn.down.layer is model.blocks[0].ffn.down


def test_merged_layers_are_the_layers_side_by_side():
    """Float and int8 layers merge bit for bit; kinds that differ don't."""
    layers = [nn.Linear(16, n) for n in (8, 4, 12)]
    x = torch.randn(3, 16)
    assert_close(merge_linears(layers)(x), torch.cat([layer(x) for layer in layers], -1))
    small = [Int8Linear.from_weight(layer.weight, layer.bias) for layer in layers]
    assert torch.equal(merge_linears(small)(x), torch.cat([layer(x) for layer in small], -1))
    assert merge_linears([layers[0], small[1]]) is None
    assert merge_linears([layers[0], nn.Linear(16, 3, bias=False)]) is None


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("kind", ["int8"])  # 10 s each
def test_compiled_gives_the_same(kind):
    """Written out as C++ and compiled, a token has the same logits, from the second position to the limit."""
    model = KINDS[kind](decoder(qk_norm=True))
    fast, ids = for_decoding(model, backend="inductor"), tokens(1, 60)
    caches = [KVCache.for_model(m) for m in (model, fast)]
    for piece in ids.split([1] * 60, dim=1):
        slow, quick = (run(lambda i, m=m, c=c: m(i, c), piece) for m, c in zip((model, fast), caches, strict=True))
        assert_close(quick, slow)


def test_other_models_are_refused():
    """Only a DecoderLM has the parts to merge."""
    with pytest.raises(TypeError, match="takes a DecoderLM, got MLP"):
        for_decoding(MLP(MLPConfig()))
    with pytest.raises(ValueError, match="backend is 'openvino'; allowed: torchscript, inductor"):
        for_decoding(decoder(), backend="openvino")
