"""A decoder made ready for decoding against the one it was made from."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import helpers
import pytest
import torch
from helpers import assert_close, cosine, in_int8, run, tokens
from torch import nn

from quantize.compression.half import to_half
from quantize.compression.int4 import quantize_weights
from quantize.compression.low_rank import factorize_low_rank
from quantize.models import MLP, MLPConfig
from quantize.native import build
from quantize.nn.int4 import Int4Linear
from quantize.nn.int8 import Int8Linear
from quantize.run.decoding import DecodingLM, for_decoding, recognition
from quantize.run.decoding.torchscript import side_by_side
from quantize.run.generate import generate, generate_stream
from quantize.run.kv_cache import KVCache

decoder = partial(helpers.decoder, noise=0.2)
KINDS = {
    "fp32": lambda m: m,
    "fp16": to_half,
    "bf16": lambda m: to_half(m, torch.bfloat16),
    "int8": in_int8,
    "int4": quantize_weights,
    "low rank": lambda m: factorize_low_rank(m, ratio=0.7),
    "low rank int8": lambda m: in_int8(factorize_low_rank(m, ratio=0.7)),
}


class EightBit(nn.Linear):
    """What step.cpp computes with 4-bit weights: every 32 inputs share a step of 1/127 of the
    largest.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = x.unflatten(-1, (-1, 32))
        step = (blocks.abs().amax(-1, keepdim=True) * (1 / 127)).clamp_min(1e-30)
        return super().forward(((blocks * step.reciprocal()).round() * step).flatten(-2))


@torch.no_grad()
def eight_bit_twin(small: nn.Module, source: nn.Module) -> nn.Module:
    """`source` with the 4-bit weights of `small` and inputs in 8 bits, as native code computes."""
    twin = copy.deepcopy(source)
    for name, layer in small.named_modules():
        if isinstance(layer, Int4Linear):
            place = twin.get_submodule(name)
            place.weight.copy_(layer.dense_weight())
            place.__class__ = EightBit
    return twin


NATIVE = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
CHANGES = {"qk_norm": True, "qkv_bias": True, "tied_head": True}
BACKENDS = [pytest.param("native", marks=NATIVE), "torchscript"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, pytest.param(CHANGES, marks=pytest.mark.slow)])
def test_same_logits_and_tokens(kind, changes, backend):
    """Of every compressed kind, in one pass, token by token and by several, growing past the first
    block, for one row and several.
    """
    source = decoder(**changes)
    model = KINDS[kind](source)
    fast = for_decoding(model, backend=backend)
    ids = tokens(2, 40)
    # Eager bf16 multiplies in bfloat16, whose sums depend on how many rows there are; native is
    # more exact. Native int4 has inputs in 8 bits, as `EightBit` says.
    rounded = torch.bfloat16 if kind in ("int4", "bf16") else None
    assert_close(run(fast, ids), run(model, ids), dtype=rounded)
    if (kind, backend) == ("int4", "native"):
        model, rounded = eight_bit_twin(model, source), None
    for batch in (1, 2):
        caches = [KVCache.for_model(m, batch=batch, block=8) for m in (model, fast)]
        for piece in ids[:batch, :35].split([5, *[1] * 8, 4, *[1] * 4, 10, *[1] * 4], dim=1):
            slow, quick = (
                run(lambda i, m=m, c=c: m(i, c), piece)
                for m, c in zip((model, fast), caches, strict=True)
            )
            assert_close(quick, slow, dtype=rounded, factor=2.0)
    if rounded is None:
        assert torch.equal(
            generate(fast, ids[:, :5], max_new_tokens=50),
            generate(model, ids[:, :5], max_new_tokens=50),
        )


@NATIVE
@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16", "int8", "int4", "low rank int8"])
@pytest.mark.parametrize("cache", [None, torch.bfloat16, torch.float16, torch.int8])
def test_native_equals_a_pass_without_a_cache(kind, cache):
    """Several tokens at a time and one by one, after a prompt, give the logits of a single pass
    over the whole text.
    """
    source = decoder(qk_norm=True, max_length=512)
    model = KINDS[kind](source)
    ids = tokens(2, 300)
    exact = eight_bit_twin(model, source) if kind == "int4" else model
    expected, held = run(exact, ids), KVCache.for_model(model, batch=2, dtype=cache)
    fast = for_decoding(model, backend="native")
    pieces = ids.split([270, 8, 1, 3, 1, 1, 7, 2, 7], dim=1)
    got = torch.cat([run(lambda i: fast(i, held), piece) for piece in pieces], dim=1)
    if "int" not in kind and cache is not torch.int8:
        rounded = torch.bfloat16 if kind == "bf16" else cache
        assert_close(got, expected, dtype=rounded, factor=3.0)
        return
    assert cosine(got, expected) > 0.995
    if cache is not None:
        own = KVCache.for_model(exact, batch=2, dtype=cache)
        expected = run(lambda i: exact(i, own), ids)
    # A number that rounds the other way is a whole step off, here and at later positions: more of
    # them where attention has 16-bit operands.
    least = 0.2 if cache is torch.int8 else 0.8
    off = (got - expected).abs().amax(-1) / expected.abs().max()
    assert (off < 3e-5).float().mean() > least and off.max() < 0.05


@NATIVE
def test_prompts_of_bfloat16(monkeypatch):
    """Native code reads them where the CPU has no instructions for it: bit for bit as by parts, and
    no further from the same weights in float32 than PyTorch's products are.
    """
    monkeypatch.setattr(recognition, "native_bf16", lambda: False)
    model = decoder().to(torch.bfloat16)
    fast, ids = for_decoding(model, backend="native"), tokens(2, 40)
    caches = [KVCache.for_model(model, batch=2) for _ in range(2)]
    whole = run(lambda i: fast(i, caches[0]), ids)
    parts = [run(lambda i: fast(i, caches[1]), piece) for piece in ids.split([30, 1, 9], dim=1)]
    assert torch.equal(whole, torch.cat(parts, dim=1))
    exact = run(copy.deepcopy(model).float(), ids)
    native, stock = (float((y - exact).norm()) for y in (whole, run(model, ids)))
    assert native < stock


@NATIVE
@pytest.mark.parametrize("head_dim", [10, 64, 80])
def test_integer_attention_costs_no_accuracy(head_dim):
    """Over parts of vectors and of chunks: what floats give over the same cache of int8."""
    model = decoder(width=64, head_dim=head_dim, max_length=600)
    fast, held = for_decoding(model, backend="native"), KVCache.for_model(model, dtype=torch.int8)
    for length in (1, 14, 240, 2, 270):
        run(lambda ids: model(ids, held), tokens(1, length))
        twin, ids = held.fork(), tokens(1, 1)
        exact = run(lambda ids, cache=twin: model(ids, cache), ids)
        assert_close(run(lambda ids: fast(ids, held), ids), exact, factor=30.0)


@NATIVE
@pytest.mark.parametrize("width", [32, 36, 80, 100])
def test_native_takes_any_width(width):
    """Widths that fill no vector register, and pruned ones, as much as round ones."""
    for kind in ("fp32", "fp16", "int8"):
        model = KINDS[kind](decoder(width=width, ffn_width=width + 6, head_dim=10))
        fast, ids = for_decoding(model, backend="native"), tokens(1, 20)
        caches = [KVCache.for_model(m) for m in (model, fast)]
        for piece in ids.split([6, 1, 5, 1, 7], dim=1):
            slow, quick = (
                run(lambda i, m=m, c=c: m(i, c), piece)
                for m, c in zip((model, fast), caches, strict=True)
            )
            if kind == "int8":  # a number that rounds the other way is a whole step off
                assert cosine(quick, slow) > 0.99
            else:
                assert_close(quick, slow)


@NATIVE
@pytest.mark.parametrize(
    ("width", "group_size"), [(32, 32), (96, 32), (544, 32), (192, 64), (640, 128)]
)
def test_native_multiplies_four_bit_weights_of_any_width(width, group_size):
    """Odd and even numbers of groups, more and fewer than a vector of them, one row and several."""
    model = decoder(width=width, ffn_width=2 * width, head_dim=group_size // 4)
    with torch.no_grad():
        for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
            layer.weight /= width**0.5  # so that rounding isn't amplified from layer to layer
    small = quantize_weights(model, group_size=group_size)
    exact = eight_bit_twin(small, model)
    fast, ids = for_decoding(small, backend="native"), tokens(1, 32)
    caches = [KVCache.for_model(m) for m in (exact, fast)]
    for piece in ids.split([1, 2, 3, 1, 4, 21], dim=1):
        slow, quick = (
            run(lambda i, m=m, c=c: m(i, c), piece)
            for m, c in zip((exact, fast), caches, strict=True)
        )
        assert_close(quick, slow, factor=20.0)


@NATIVE
@pytest.mark.parametrize("kind", ["fp32", "int8", "int4"])
def test_native_lets_no_nan_through(kind):
    """A weight that isn't finite shows in the logits, as without native: garbage never looks like a
    number.
    """
    model = decoder()
    with torch.no_grad():
        model.blocks[0].attention_norm.weight[3] = float("nan")
    fast = for_decoding(KINDS[kind](model), backend="native")
    with pytest.raises(ValueError, match="aren't finite"):
        generate(fast, tokens(1, 4), max_new_tokens=4)
    cache = KVCache.for_model(fast)
    run(lambda i: fast(i, cache), tokens(1, 4))
    assert run(lambda i: fast(i, cache), tokens(1, 1)).isnan().all()


@NATIVE
def test_copies_run_too():
    """A copy, a pickled and a converted model make their pointers anew."""
    fast = for_decoding(decoder(), backend="native")
    expected = generate(fast, tokens(1, 4), max_new_tokens=8)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(generate(other, tokens(1, 4), max_new_tokens=8), expected)
    half = for_decoding(decoder().bfloat16(), backend="native")
    assert torch.equal(
        generate(fast.bfloat16(), tokens(1, 4), max_new_tokens=8),
        generate(half, tokens(1, 4), max_new_tokens=8),
    )


@NATIVE
def test_what_native_does_not_know_is_named():
    """Hooks and strange layers leave the model to TorchScript, and say why."""
    model = decoder()
    model.blocks[1].ffn.register_forward_hook(lambda *_: None)
    fast = for_decoding(model)
    assert fast.backend == "torchscript" and "blocks.1.ffn has hooks" in fast.reason
    with pytest.raises(
        ValueError, match=r"'native' can't run this model: blocks\.1\.ffn has hooks"
    ):
        for_decoding(model, backend="native")
    model = decoder()
    model.blocks[0].ffn.down = nn.Sequential(model.blocks[0].ffn.down)
    with pytest.raises(ValueError, match="it has a Sequential"):
        for_decoding(model, backend="native")


@pytest.mark.parametrize(
    "options",
    [
        {"cache": torch.int8},
        {"draft": "lookup", "draft_tokens": 3},
        {"temperature": 1.0, "seed": 0},
    ],
)
def test_everything_else_still_works(options):
    """Narrow caches, drafts and sampling give what the model itself gives."""
    model = decoder()
    expected = generate(model, tokens(1, 9), max_new_tokens=40, **options)
    assert torch.equal(
        generate(for_decoding(model), tokens(1, 9), max_new_tokens=40, **options), expected
    )


def test_ragged_rows_and_windows():
    """Rows of different length, and caches with a window, go around the graph."""
    model, prompts = decoder(), [tokens(3), tokens(7)]
    fast = for_decoding(model)
    for a, b in zip(
        generate(fast, prompts, max_new_tokens=9),
        generate(model, prompts, max_new_tokens=9),
        strict=True,
    ):
        assert torch.equal(a, b)
    windows = [KVCache.for_model(m, window=9) for m in (fast, model)]
    texts = [
        generate(m, tokens(1, 5), max_new_tokens=90, cache=c)
        for m, c in zip((fast, model), windows, strict=True)
    ]
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
    """The model it was made from keeps its modules and weights, and runs longer passes itself."""
    model = in_int8(decoder())
    before = {n: p.clone() for n, p in model.state_dict().items()}
    for backend in (None, "torchscript"):
        fast = for_decoding(model, backend=backend)
        list(generate_stream(fast, tokens(1, 3), max_new_tokens=3))
        assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
        assert isinstance(fast, DecodingLM)
        assert fast.model is model


def test_layers_side_by_side_give_what_they_give_alone():
    """In any order, int8 layers bit for bit; kinds that differ and layers with hooks stay."""
    layers = [nn.Linear(16, n) for n in (8, 4, 12)]
    small = [Int8Linear.from_weight(layer.weight, layer.bias) for layer in layers]
    x = torch.randn(2, 3, 16)
    for part, layer in reversed([*zip(side_by_side(layers), layers, strict=True)]):
        assert_close(part(x), layer(x))
    for part, layer in reversed([*zip(side_by_side(small), small, strict=True)]):
        assert torch.equal(part(x), layer(x))
    for others in ([layers[0], small[1]], [layers[0], nn.Linear(16, 3, bias=False)]):
        assert side_by_side(others) is others
    layers[1].register_forward_hook(lambda *_: None)
    assert side_by_side(layers) is layers


def test_other_models_are_refused():
    """Only a DecoderLM has the parts to merge."""
    with pytest.raises(TypeError, match="takes a DecoderLM, got MLP"):
        for_decoding(MLP(MLPConfig()))
    with pytest.raises(
        ValueError, match="backend is 'openvino'; allowed: None, 'native', 'torchscript'"
    ):
        for_decoding(decoder(), backend="openvino")
