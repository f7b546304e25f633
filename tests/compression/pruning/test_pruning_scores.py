"""Structured pruning: which units go, against plain definitions."""

from __future__ import annotations

import itertools
import math
import weakref

import pytest
import torch
from helpers import assert_close, cosine, run
from hypothesis import given
from hypothesis import strategies as st
from pruning_models import Branches, X, mlp, randn, seeded, size
from torch import nn

from quantize.calibration import InputStatistics
from quantize.compression.pruning import prune_ln_structured, scores
from quantize.compression.pruning.budget import share_out


@pytest.mark.parametrize("n", [1, 2, 3.5, math.inf])
def test_keeps_the_largest_norms(n):
    """The rows that stay are those with the largest Ln norm, as torch's ln_structured chooses."""
    model = mlp()
    norms = torch.linalg.vector_norm(model[0].weight, n, dim=1)
    pruned = prune_ln_structured(model, randn(2, 8), amount={"0": 0.5}, n=n)
    assert torch.equal(pruned[0].weight, model[0].weight[norms.topk(16).indices.sort().values])


class Stack(Branches):
    """Residual MLPs of one shape, of which the second does next to nothing."""

    def build(self):
        self.ups = nn.ModuleList(nn.Linear(8, 64) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(64, 8) for _ in range(3))
        self.downs[1].weight.data *= 1e-3

    def forward(self, x):
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(up(x).relu())
        return x


def test_alike_layers_share_what_is_removed():
    """With calibration, layers of one shape lose more where it costs less, together as much; named
    one by one, what is said.
    """
    model, x = seeded(Stack), randn(128, 8)
    plain = prune_ln_structured(model, x)
    widths = lambda m: [up.out_features for up in m.ups]  # noqa: E731
    assert widths(plain) == [32, 32, 32]
    shared = prune_ln_structured(model, x, calibration=[x])
    assert size(shared) == size(plain) and min(widths(shared)) == widths(shared)[1] == 8
    by_name = prune_ln_structured(
        model, x, calibration=[x], amount={f"ups.{i}": 0.5 for i in range(3)}
    )
    assert widths(by_name) == [32, 32, 32]
    error = lambda m: (run(m, x) - run(model, x)).square().mean()  # noqa: E731
    assert error(shared) < error(by_name)


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=2, max_size=3),
    st.integers(1, 6),
)
def test_sharing_out_is_optimal_for_convex_costs(slopes, total):
    """The greedy walk finds the cheapest way to give `total` units where each further unit of a
    group costs no less.
    """
    costs = [torch.tensor([0.0, *sorted(s)]).cumsum(0) for s in slopes]
    given_ = share_out(costs, total, 1)
    ways = [w for w in itertools.product(range(5), repeat=len(costs)) if sum(w) == total]
    assert sum(given_) == total
    assert float(sum(c[k] for c, k in zip(costs, given_, strict=True))) == min(
        float(sum(c[k] for c, k in zip(costs, w, strict=True))) for w in ways
    )


def test_reconstruction_costs_are_what_a_refit_leaves():
    """The cost of removing k units is the least-squares error that remains without them, as the
    metric weighs it.
    """
    x, weight, half = (
        randn(200, 10).double() @ randn(10, 10).double(),
        randn(4, 10).double(),
        randn(4, 4).double(),
    )
    seen = InputStatistics()
    seen.update(x)
    reader = scores.Reader(weight, torch.arange(10).view(5, 2), seen, half.T @ half)
    order, costs = scores.reconstruction([reader], 3, ridge=0.0)
    for k in range(4):
        stays = torch.ones(10, dtype=torch.bool)
        stays[reader.places[order.argsort()[:k]].flatten()] = False
        target = x @ weight.T
        rest = target - x[:, stays] @ torch.linalg.lstsq(x[:, stays], target).solution
        assert_close(costs[k], (rest @ half.T).square().sum(), dtype=torch.float32, factor=100)


@pytest.mark.parametrize("size", [1, 3])
def test_units_go_in_the_order_of_the_plain_elimination(size):
    """Block by block, the factorization gives the order and the costs of inverting what is left
    after each removal.
    """
    units, step = 40, 2
    x = randn(300, units * size).double() @ randn(units * size, units * size).double()
    weight = randn(6, units * size).double()
    seen = InputStatistics()
    seen.update(x)
    reader = scores.Reader(weight, torch.arange(units * size).view(units, size), seen)
    score, costs = scores.reconstruction([reader], 30, ridge=1e-3, rounds=15)
    moment = seen.second_moment
    moment = moment + 1e-3 * moment.diagonal().mean() * torch.eye(len(moment), dtype=x.dtype)
    scale = ((weight @ moment) * weight).sum()
    stays = torch.ones(units, dtype=torch.bool)

    def cost_of(gone: torch.Tensor) -> float:
        kept = ~gone.repeat_interleave(size)
        cross = weight @ moment[:, kept]
        fitted = torch.linalg.solve(moment[kept][:, kept], cross.T).T
        return float(((weight @ moment) * weight).sum() - (fitted * cross).sum()) / float(scale)

    for done in range(0, 30, step):
        tried = torch.full((units,), math.inf, dtype=torch.float64)
        for unit in stays.nonzero().flatten():
            gone = ~stays
            gone[unit] = True
            tried[unit] = cost_of(gone)
        chosen = tried.argsort()[:step]
        assert set(chosen.tolist()) == set(score.argsort()[done : done + step].tolist())
        stays[chosen] = False
        assert costs[done + step] == pytest.approx(cost_of(~stays), rel=1e-4)


def test_wide_convolutions_are_scored_by_whole_channels(monkeypatch):
    """Channels that are multiples of others cost nothing: half of them go, and nothing changes."""
    torch.manual_seed(0)
    layers = [nn.Conv1d(2, 16, 5), nn.ReLU(), nn.Conv1d(16, 4, 7), nn.ReLU(), nn.Conv1d(4, 3, 1)]
    model, x = nn.Sequential(*layers).eval(), randn(4, 2, 64)
    with torch.no_grad():
        model[0].weight[8:] = 0.5 * model[0].weight[:8]
        model[0].bias[8:] = 0.5 * model[0].bias[:8]
    monkeypatch.setattr("quantize.compression.pruning.readers.WIDEST", 20)
    lines: list[str] = []
    pruned = prune_ln_structured(
        model, x, amount={"0": 0.5}, calibration=[x], round_to=1, progress=lines.append
    )
    assert pruned[2].in_channels == 8
    assert cosine(pruned(x), model(x)) > 1 - 1e-6
    assert any("by whole channels" in line and line.endswith(": 2") for line in lines)


def test_calibration_is_streamed():
    """One batch at a time is alive, and what is kept of them has the size of the layers."""
    model, alive = mlp(), []

    class Batches:
        def __iter__(self):
            for i in range(6):
                batch = randn(32, 8) + i
                alive.append(weakref.ref(batch))
                # the one in use, until the name is bound again
                assert sum(ref() is not None for ref in alive) <= 2
                yield batch

    prune_ln_structured(model, X, calibration=Batches())
    assert len(alive) > 6 and not any(ref() is not None for ref in alive)


def test_dead_neurons_go_first():
    """Neurons that never fire are removed first, whatever their norm, and nothing changes."""
    model, x = mlp(), randn(64, 8)
    with torch.no_grad():
        model[0].weight[::2] *= 10
        model[0].bias[::2] = -1000.0
    pruned = prune_ln_structured(model, x, amount={"0": 0.5}, calibration=[x])
    assert_close(pruned(x), model(x))
