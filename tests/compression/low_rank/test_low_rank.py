"""Low rank: the walk over models, how much it takes, and that it leaves the input as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import ZOO, assert_close, cosine, randn, run, tokens, zoo
from low_rank_models import data, mlp, pairs_in, parameters
from torch import nn

from quantize.calibration import distance
from quantize.compression.low_rank import factorize_low_rank


@pytest.mark.parametrize("name", ZOO)
def test_zoo_gets_smaller_and_still_runs(name):
    """Every foreign model keeps about half of the parameters of the layers that were factorized;
    the input is untouched. Calibrated, it is closer than without, on other inputs too.
    """
    model, inputs = zoo(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = run(model, inputs)
    plain = factorize_low_rank(model, only_faster=False)
    calibrated = factorize_low_rank(model, calibration=[inputs], only_faster=False)
    for small in (plain, calibrated):
        out = run(small, inputs)
        assert out.shape == expected.shape and out.isfinite().all()
        assert parameters(small) < 0.65 * parameters(model)
        assert pairs_in(small) and not pairs_in(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert cosine(run(calibrated, inputs), expected) > 0.98
    others = [other(inputs, seed) for seed in (5, 6, 7)]  # on few rows, and not to those alone
    assert distance(calibrated, model, others) < distance(plain, model, others)


def other(inputs: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Random inputs like these; what says which of them count stays."""
    drawn = {}
    for name, value in inputs.items():
        drawn[name] = value
        if value.is_floating_point():
            drawn[name] = randn(*value.shape, seed=seed)
        elif name.endswith("input_ids"):
            drawn[name] = tokens(*value.shape, seed=seed)
    return drawn


def test_ratio_one_changes_nothing():
    """ratio=1 returns an equal model without pairs."""
    model, x = mlp(64, 96, 32), data(64)
    same = factorize_low_rank(model, ratio=1, calibration=x)
    assert same is not model and not pairs_in(same)
    assert torch.equal(same(x[0]), model(x[0]))


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_of_low_rank_is_found(bias):
    """A weight that has rank 8 is reproduced at rank 8, with and without calibration."""
    model = mlp(64, 64, bias=bias)
    model[0].weight.data = torch.randn(64, 8) @ torch.randn(8, 64) / 8
    for calibration in (None, data(64)):
        small = factorize_low_rank(model, rank=8, calibration=calibration)
        x = data(64, seed=5)[0]
        assert_close(small(x), model(x), factor=10)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("calibrated", [False, True])
def test_ratio_is_kept(ratio, calibrated):
    """The weights that remain are at most the ratio of the weights that were, and not much less."""
    model = mlp(128, 256, 128, 64, bias=False)
    small = factorize_low_rank(
        model, ratio=ratio, calibration=data(128) if calibrated else None, only_faster=False
    )
    assert ratio - 0.08 <= parameters(small) / parameters(model) <= ratio


def test_a_dict_touches_only_what_it_names():
    """Names and globs select layers and set each one's own value; the rest stays."""
    model = nn.Sequential(mlp(64, 64, 64), mlp(64, 64, 64))
    small = factorize_low_rank(model, rank={"0.*": 8, "1.2": 16}, calibration=data(64))
    assert {n: m.rank for n, m in pairs_in(small).items()} == {"0.0": 8, "0.2": 8, "1.2": 16}


def test_a_second_pass_leaves_pairs_alone():
    """Factorizing a factorized model doesn't factorize the factors."""
    small = factorize_low_rank(mlp(64, 64, 64), rank={"0": 8})
    twice = factorize_low_rank(small, rank=8)
    assert list(pairs_in(twice)) == ["0", "2"] and twice[0].rank == 8


@pytest.mark.parametrize("ratio", [0.85, 0.95])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_ratio_near_one_leaves_some_layers_whole(ratio, calibrated):
    """Pairs of almost the layer's size would be slower: the budget is met by smaller ones beside
    layers that stay whole.
    """
    model = mlp(128, 256, 128, 256, 64, bias=False)
    small = factorize_low_rank(model, ratio=ratio, calibration=data(128) if calibrated else None)
    shares = [
        parameters(pair) / model.get_submodule(name).weight.numel()
        for name, pair in pairs_in(small).items()
    ]
    assert 0 < len(shares) < 4 and max(shares) <= 0.8
    assert parameters(small) <= ratio * parameters(model)


def test_mode_flags_and_gradients_of_the_input_stay():
    """The input keeps its training flags, hooks and gradients; frozen weights give frozen pairs."""
    model = mlp(64, 64, 64).train()
    model[0].requires_grad_(False)
    small = factorize_low_rank(model, calibration=data(64))
    assert model.training and model[0].training
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p.requires_grad for p in small[0].parameters())
    assert all(p.requires_grad for p in small[2].parameters())
    assert not small.training


class Stateful(nn.Module):
    """Counts its calls, keeps a running mean, works in place on its input, draws random numbers; a
    module has two names.
    """

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(64, 96), nn.ReLU(inplace=True), nn.Linear(96, 64))
        self.alias, self.calls = self.block, 0
        self.register_buffer("mean", torch.zeros(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.mean.mul_(0.9).add_(x.mean(0) + torch.rand(64) * 0.1)
        x.sub_(self.mean)
        return self.block(x).add_(self.alias(x)) * self.calls


def test_state_stays():
    """A model whose forward changes its state, its inputs and the random state stays as it is; the
    result starts there.
    """
    model, x = Stateful().eval(), data(64)
    state, batches, random = (
        copy.deepcopy(model.state_dict()),
        [b.clone() for b in x],
        torch.get_rng_state(),
    )
    small = factorize_low_rank(model, calibration=x)
    assert list(pairs_in(small)) and model.calls == small.calls == 0 and not small.mean.any()
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(x, batches, strict=True))
    assert torch.equal(torch.get_rng_state(), random)


def test_models_without_gradients_are_factorized():
    """Where no gradient can be had (an operation without one, outputs of integers), layers count by
    their own outputs.
    """

    class Ranked(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(64, 64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x).argmax(-1)

    assert pairs_in(factorize_low_rank(Ranked(), calibration=data(64)))


def test_models_made_in_inference_mode_are_factorized():
    """They give the factors that the same weights give otherwise."""
    model, batches = (
        nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval(),
        [torch.randn(16, 32)],
    )
    with torch.inference_mode():
        twin = copy.deepcopy(model)
    options = {"ratio": 0.7, "calibration": batches, "only_faster": False}
    expected, result = (factorize_low_rank(m, **options)(batches[0]) for m in (model, twin))
    assert torch.equal(result, expected)
