"""Structured pruning: the smaller model is the masked one, whatever the architecture."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import ZOO, assert_close, cosine, in_int8, run, zoo
from pruning_models import SMALL, Attention, X, mlp, randn, seeded, size, small, state, untouched
from torch import nn

from quantize import generate, load, save, to_half
from quantize.compression.distillation import make_student
from quantize.compression.low_rank import factorize_low_rank
from quantize.compression.pruning import prune_ln_structured, traced_once


@pytest.mark.parametrize("name", SMALL)
def test_pruned_equals_masked(name):
    """The smaller model computes what the full one computes with zeros in the removed places, with
    calibration and without.
    """
    model, inputs = small(name)
    before = state(model)
    with traced_once(model, inputs):
        for calibration in (None, [inputs]):
            options = {"amount": 0.5, "calibration": calibration}
            pruned = prune_ln_structured(model, inputs, **options)
            masked = prune_ln_structured(model, inputs, masked=True, **options)
            assert size(pruned) < size(model) == size(masked)
            assert_close(run(pruned, inputs), run(masked, inputs), factor=10)
            assert untouched(model, before)


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name, tmp_path):
    """Models that others wrote: pruned equals masked, and the file loads into a fresh instance.
    Two layers are met in the decoder of `SMALL`, and by models with a cache.
    """
    model, inputs = zoo(name, shallow=True)
    with traced_once(model, inputs):
        for amount in (0.25, 0.5):
            pruned = prune_ln_structured(model, inputs, amount=amount)
            masked = prune_ln_structured(model, inputs, amount=amount, masked=True)
            assert size(pruned) < size(model)
            assert_close(run(pruned, inputs), run(masked, inputs), factor=10)
            save(pruned, tmp_path / f"{amount}.pth")
            again = load(tmp_path / f"{amount}.pth", model=zoo(name, seed=1, shallow=True)[0])
            assert_close(run(again, inputs), run(pruned, inputs))


def test_a_model_traced_once_is_pruned_as_others_are(monkeypatch):
    """The same bits as without, with one graph of that model on those inputs; a model made of it,
    and other inputs, have graphs of their own.
    """
    model, inputs = small("attention")
    amounts, graphs, real = (0.25, 0.5), [], torch.export.export
    alone = [state(prune_ln_structured(model, inputs, amount=amount)) for amount in amounts]
    monkeypatch.setattr("torch.export.export", lambda *a, **o: graphs.append(a) or real(*a, **o))
    with traced_once(model, inputs):
        made = [prune_ln_structured(model, inputs, amount=amount) for amount in amounts]
        assert len(graphs) == 1
        prune_ln_structured(made[0], inputs)
        prune_ln_structured(model, inputs.clone())
        assert len(graphs) == 3
    prune_ln_structured(model, inputs)
    assert len(graphs) == 4
    assert [untouched(one, before) for one, before in zip(made, alone, strict=True)] == [True] * 2


def test_twice(tmp_path):
    """A pruned model can be pruned again, saved and loaded into a fresh original."""
    model, inputs = small("attention")
    twice = prune_ln_structured(prune_ln_structured(model, inputs), inputs)
    assert twice.num_heads == 1 and twice.qkv.out_features == 24
    save(twice, tmp_path / "twice.safetensors")
    assert_close(
        run(load(tmp_path / "twice.safetensors", model=Attention()), inputs), run(twice, inputs)
    )


def test_composes_with_low_rank(tmp_path):
    """Low-rank pairs shrink on their outside and keep their rank; pruned models can be factorized;
    both save and load.
    """
    build = partial(mlp, 64, 96, 64, 48)
    x = randn(64, 64)
    pairs = factorize_low_rank(build(), ratio=0.5)
    rank = pairs[0].rank
    pruned = prune_ln_structured(pairs, x, calibration=[x])
    assert (pruned[0].rank, pruned[0].out_features, pruned[2].in_features) == (rank, 48, 48)
    after = factorize_low_rank(prune_ln_structured(build(), x), ratio=0.5)
    for i, model in enumerate((pruned, after)):
        save(model, tmp_path / f"{i}.pth")
        assert_close(load(tmp_path / f"{i}.pth", model=build())(x), model(x))


def test_composes_with_int8(tmp_path):
    """A pruned and repaired model can be quantized, saved and loaded into a fresh original."""
    build = partial(mlp, 64, 128, 64, 48)
    x = randn(64, 64)
    pruned = prune_ln_structured(build(), x, calibration=[x])
    small = in_int8(pruned)
    save(small, tmp_path / "small.pth")
    again = load(tmp_path / "small.pth", model=build())
    assert cosine(small(x), pruned(x)) > 0.999
    assert_close(again(x), small(x))


@pytest.mark.slow
def test_layers_with_unlike_heads_decode():
    """Where layers keep different numbers of heads, cached tokens are still the uncached ones."""
    model, inputs = small("decoder")
    with torch.no_grad():
        model.blocks[0].attention.out.weight *= 1e-3
    amount = {"blocks.0.attention.k": 0.5, "blocks.*.ffn.up": 0.5}
    pruned = prune_ln_structured(model, inputs, amount=amount, calibration=[inputs])
    assert [b.attention.k.out_features for b in pruned.blocks] == [8, 16]
    tokens = [generate(pruned, inputs, max_new_tokens=6, cache=cache) for cache in (True, False)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize(
    "name", ["gpt2", pytest.param("llama"), pytest.param("t5", marks=pytest.mark.slow)]
)
def test_models_with_a_cache(name):
    """A decoder is pruned as it comes, with its cache on; where all layers agree, its config builds
    the pruned shapes.
    """
    model, inputs = zoo(name)
    model.config.use_cache = True
    feed_forward = {"gpt2": "*.c_fc", "llama": "*", "t5": "*.wi"}[name]
    pruned = prune_ln_structured(model, inputs, amount={feed_forward: 0.5})
    assert pruned.config.use_cache and model.config.use_cache
    with torch.device("meta"):
        built = type(pruned)(pruned.config)
    shapes = lambda m: {name: p.shape for name, p in m.named_parameters()}  # noqa: E731
    assert shapes(built) == shapes(pruned) != shapes(model)


class StepsOfFixedSize(nn.Module):
    """Keeps a state for generation, as a model of transformers does, of a size that only its config
    knows.
    """

    class config:
        use_cache = True

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).relu()
        y = y + torch.zeros(32) if self.config.use_cache else y
        return self.third(self.second(y).relu())


@pytest.mark.parametrize(
    "shrink", [prune_ln_structured, lambda m, x: make_student(m, width=0.5, example_inputs=x)]
)
def test_a_cache_of_a_fixed_size_keeps_its_channels(shrink):
    """What only a call with the cache would show is tried too: the pruned model runs in both
    ways.
    """
    result = shrink(seeded(StepsOfFixedSize), X)
    assert result(X).shape == (len(X), 4)
    assert (result.first.out_features, result.second.out_features) == (32, 16)


class Anchored(nn.Module):
    """A detector that makes its anchors at the first call with images of a size."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.ReLU(), nn.Conv2d(16, 4, 1))
        self.strides, self.anchors, self.size = torch.tensor([4.0]), torch.empty(0), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers(x).flatten(2)
        if self.size != x.shape[2:]:
            steps = torch.arange(y.shape[2]) * float(self.strides[0])
            self.anchors, self.size = steps, x.shape[2:]
        return y + self.anchors


def test_what_a_first_call_keeps_is_made_before_a_model_is_followed():
    """Also where making it can't be traced; the model is as before, and the pruned one makes its
    own.
    """
    model = seeded(Anchored)
    pruned = prune_ln_structured(model, randn(2, 3, 16, 16), amount=0.5)
    assert model.size is None and pruned.size is None
    assert pruned.layers[0].out_channels == 8
    for side in (16, 24):
        x = randn(1, 3, side, side)
        expected = pruned.layers(x).flatten(2) + torch.arange((side // 4) ** 2) * 4
        assert torch.equal(pruned(x), expected)


def test_composes_with_half():
    """A model stored in 16 bits can be pruned."""
    half = to_half(mlp())
    pruned = prune_ln_structured(half, X, calibration=[X])
    masked = prune_ln_structured(half, X, calibration=[X], masked=True)
    assert size(pruned) < size(half)
    assert_close(run(pruned, X), run(masked, X), dtype=torch.float16)
