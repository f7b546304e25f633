"""Low rank: the formulas against oracles, the walk over foreign models, what composes, what is
refused.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers import ZOO, assert_close, cosine, in_int8, run, zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import quantize
from quantize import surgery
from quantize.calibration import compensate, find_streams
from quantize.compression.low_rank import factorize_low_rank, maths, summary, timing
from quantize.nn.int8 import Int8Linear
from quantize.nn.low_rank import LowRankConv2d, LowRankLinear

PAIRS = (LowRankLinear, LowRankConv2d)


def moment(width: int, rows: int, seed: int = 0) -> torch.Tensor:
    """Second moment of `rows` correlated random vectors."""
    generator = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(rows, width, generator=generator).double()
        @ torch.randn(width, width, generator=generator).double()
    )
    return x.T @ x / rows


def loss(error: torch.Tensor, inputs: torch.Tensor | None, outputs: torch.Tensor | None) -> float:
    """tr(G E S E^T), the loss that the whitened SVD minimises."""
    s = torch.eye(error.shape[1]).double() if inputs is None else inputs
    g = torch.eye(error.shape[0]).double() if outputs is None else outputs
    return torch.trace(g @ error @ s @ error.T).item()


def mlp(*widths: int, bias: bool = True, seed: int = 0) -> nn.Sequential:
    """Linears of these widths with GELU between them."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), nn.GELU()]
    return nn.Sequential(*layers[:-1]).eval()


def data(width: int, rows: int = 512, batches: int = 2, seed: int = 0) -> list[torch.Tensor]:
    """Correlated inputs with a mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.linspace(1, 0.02, width)[:, None]
    return [torch.randn(rows, width, generator=generator) @ mix + 0.5 for _ in range(batches)]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def pairs_in(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, PAIRS)}


# The formulas.

shapes = st.tuples(st.integers(1, 24), st.integers(1, 24))


@settings(max_examples=40, deadline=None)
@given(shape=shapes, whiten=st.booleans(), weigh=st.booleans(), deficient=st.booleans())
def test_full_rank_reproduces_the_weight(shape, whiten, weigh, deficient):
    """At full rank second @ first is the weight, whatever the moments, rank-deficient ones
    included.
    """
    m, k = shape
    weight = torch.randn(m, k, generator=torch.Generator().manual_seed(m * k)).double()
    s = moment(k, max(1, k // 3) if deficient else 3 * k) if whiten else None
    g = moment(m, max(1, m // 3) if deficient else 3 * m, seed=1) if weigh else None
    first, second, _ = maths.whitened_svd(weight, s, g)
    assert_close(second @ first, weight, dtype=torch.float32)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, fraction=st.floats(0, 1), whiten=st.booleans(), weigh=st.booleans())
def test_error_is_the_tail_of_the_spectrum(shape, fraction, whiten, weigh):
    """What rank r loses is the sum of the squared singular values from r on."""
    m, k = shape
    rank = max(1, round(fraction * min(m, k)))
    weight = torch.randn(m, k, generator=torch.Generator().manual_seed(m + k)).double()
    s, g = moment(k, 3 * k) if whiten else None, moment(m, 3 * m, seed=1) if weigh else None
    first, second, spectrum = maths.whitened_svd(weight, s, g, rank=rank, ridge=0, gradient_ridge=0)
    whole = (spectrum**2).sum().item()
    assert first.shape == (rank, k) and second.shape == (m, rank)
    assert loss(weight - second @ first, s, g) == pytest.approx(
        (spectrum[rank:] ** 2).sum().item(), abs=1e-8 * whole
    )
    assert_close(
        maths.whitened_spectrum(weight, s, g, ridge=0, gradient_ridge=0), spectrum, factor=1e3
    )


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_no_moments_is_the_plain_svd(shape):
    """Without moments the product is torch's truncated SVD."""
    weight = torch.randn(shape).double()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    first, second, spectrum = maths.whitened_svd(weight, rank=5)
    assert_close(second @ first, (u[:, :5] * s[:5]) @ v[:5], factor=1e3)
    assert_close(spectrum, s, factor=1e3)


def test_whitened_beats_every_perturbation():
    """No nearby factors of the same rank lose less: the closed form is a minimum."""
    weight, s, g = torch.randn(10, 14).double(), moment(14, 40), moment(10, 40, seed=1)
    first, second, _ = maths.whitened_svd(weight, s, g, rank=4, ridge=0, gradient_ridge=0)
    best = loss(weight - second @ first, s, g)
    for scale in (1e-3, 1e-2, 1e-1):
        other = (second + scale * torch.randn_like(second)) @ (
            first + scale * torch.randn_like(first)
        )
        assert loss(weight - other, s, g) > best


def test_factors_are_balanced():
    """Row i of first and column i of second have the same norm."""
    first, second, _ = maths.whitened_svd(torch.randn(9, 7).double() * 1e3, moment(7, 20), rank=6)
    assert_close(first.norm(dim=1), second.norm(dim=0))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_rank_deficient_moments_of_any_size(size):
    """One row of calibration, tiny or huge, gives finite factors and reproduces its output at rank
    1.
    """
    x = torch.randn(16).double()
    weight = torch.randn(12, 16).double()
    first, second, _ = maths.whitened_svd(weight, torch.outer(x, x) * size, rank=1, ridge=1e-9)
    assert_close(second @ (first @ x), weight @ x, dtype=torch.float32)


def test_zero_weight_and_zero_moment():
    """Nothing in, nothing out: no division by zero."""
    for s in (None, torch.zeros(6, 6)):
        first, second, spectrum = maths.whitened_svd(torch.zeros(4, 6), s, rank=2)
        assert not (second @ first).any() and not spectrum.any() and first.isfinite().all()


def test_compensation_repairs_a_linear_distortion():
    """If the compressed model's inputs are x = A r, the compensated weight is W A^-1; if x = r it
    is W.
    """
    weight, r = torch.randn(5, 8).double(), torch.randn(300, 8).double()
    distort = torch.eye(8).double() + 0.1 * torch.randn(8, 8).double()
    x = r @ distort.T
    fixed = compensate(weight, x.T @ x / 300, r.T @ x / 300, ridge=1e-12)
    assert_close(fixed, weight @ torch.linalg.inv(distort), dtype=torch.float32)
    assert_close(compensate(weight, r.T @ r, r.T @ r), weight)


def test_compensation_adds_what_is_asked_for():
    """If the layer is to give W r + D x beside inputs x = r, the compensated weight is W + D."""
    weight, more, r = (
        torch.randn(5, 8).double(),
        torch.randn(5, 8).double(),
        torch.randn(300, 8).double(),
    )
    s = r.T @ r / 300
    assert_close(
        compensate(weight, s, s, more @ s, ridge=1e-12),
        weight + more,
        dtype=torch.float32,
    )


def test_allocation_is_optimal_up_to_one_step():
    """Within the budget, the loss lies between the best by full search and the best with one step
    less to spend.
    """
    generator = torch.Generator().manual_seed(3)
    layers = {
        name: maths.choices(
            torch.rand(12, generator=generator).sort(descending=True).values,
            (12, 12),
            [1, 2, 3, 4, 5],
        )
        for name in "abc"
    }

    def best(budget: int) -> float:
        options = itertools.product(*layers.values())
        return min(
            sum(c.loss for c in o) for o in options if sum(c.parameters for c in o) <= budget
        )

    for budget in range(72, 433, 24):
        chosen = [
            next(c for c in layers[n] if c.rank == r)
            for n, r in maths.allocate(layers, budget).items()
        ]
        assert sum(c.parameters for c in chosen) <= budget
        largest_step = 144 - 24  # from rank 1 to the whole layer
        assert (
            best(budget) - 1e-9
            <= sum(c.loss for c in chosen)
            <= best(max(72, budget - largest_step)) + 1e-9
        )


def test_allocation_leaves_nothing_that_helps():
    """Of flat spectra, where all or nothing is the best use of the budget, the rest of it is used
    too.
    """
    layers = {name: maths.choices(torch.ones(16), (16, 16), range(1, 7)) for name in "abc"}
    for budget in range(96, 768, 16):
        chosen = {
            n: next(c for c in layers[n] if c.rank == r)
            for n, r in maths.allocate(layers, budget).items()
        }
        left = budget - sum(c.parameters for c in chosen.values())
        assert left >= 0
        for name, choice in chosen.items():
            assert not any(
                c.parameters - choice.parameters <= left and c.loss < choice.loss
                for c in layers[name]
            )


@pytest.mark.parametrize("rank", [0, 6, -1])
def test_rank_outside_the_matrix_is_refused(rank):
    """Ranks below 1 or above the smaller side are errors with the range."""
    with pytest.raises(ValueError, match=r"outside \[1, 5\]"):
        maths.whitened_svd(torch.ones(5, 9), rank=rank)


@pytest.mark.parametrize("shape", [(6, 3, 3, 5), (3, 8, 5, 3)])
@pytest.mark.parametrize("whiten", [True, False])
def test_spatial_split_at_full_rank_is_the_kernel(shape, whiten):
    """With as many channels between as the split has, k x 1 then 1 x k reproduce the kernel."""
    m, c, kh, kw = shape
    kernel = torch.randn(shape).double()
    s = moment(c * kh * kw, 400) if whiten else None
    first, second, product = maths.spatial_factors(kernel, s, rank=min(c * kh, m * kw))
    assert first.shape == (min(c * kh, m * kw), c, kh, 1) and second.shape == (
        m,
        min(c * kh, m * kw),
        1,
        kw,
    )
    assert_close(product.reshape(shape), kernel, dtype=torch.float32)
    assert_close(torch.einsum("mrab,rcde->mcdb", second, first), kernel, dtype=torch.float32)


def test_spatial_refit_is_the_least_squares_optimum():
    """No other second layer loses less with the same first one."""
    kernel, s = torch.randn(6, 4, 3, 3).double(), moment(36, 200)
    first, second, product = maths.spatial_factors(kernel, s, rank=3)
    best = maths.weighted_error(kernel.flatten(1) - product, s, None)
    for _ in range(5):
        other = torch.einsum("mrab,rcde->mcdb", second + 1e-3 * torch.randn_like(second), first)
        assert maths.weighted_error((kernel - other).flatten(1), s, None) > best


# Models.


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("calibrated", [False, True])
def test_zoo_gets_smaller_and_still_runs(name, calibrated):
    """Every foreign model keeps about half of the parameters of the layers that were factorized;
    the input is untouched.
    """
    model, inputs = zoo(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = run(model, inputs)
    small = factorize_low_rank(
        model, calibration=[inputs] if calibrated else None, only_faster=False
    )
    out = run(small, inputs)
    assert out.shape == expected.shape and out.isfinite().all()
    assert parameters(small) < 0.65 * parameters(model)
    assert pairs_in(small) and not pairs_in(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    if calibrated:  # few rows: a rank above their number loses next to nothing
        assert cosine(out, expected) > 0.99


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "resnet", "convnext"])
def test_structure_record_rebuilds_a_foreign_model(name):
    """A fresh model plus the record plus the tensors computes the same numbers."""
    model, inputs = zoo(name)
    small = factorize_low_rank(model, calibration=[inputs])
    fresh = surgery.rebuild(zoo(name, seed=1)[0], surgery.structure(small))
    fresh.load_state_dict(small.state_dict())
    assert_close(run(fresh, inputs), run(small, inputs))
    assert surgery.structure(fresh) == surgery.structure(small)


def test_record_of_a_resized_layer_survives():
    """A layer that was cut before it was factorized keeps both edits in the record, also after a
    second rebuild.
    """
    model = mlp(32, 48, 16)
    cut = surgery.clone(model)
    surgery.resize(
        cut[0],
        tensors={"weight": cut[0].weight[:40], "bias": cut[0].bias[:40]},
        attributes={"out_features": 40},
    )
    surgery.resize(
        cut[2], tensors={"weight": cut[2].weight[:, :40]}, attributes={"in_features": 40}
    )
    small = factorize_low_rank(cut)
    again = surgery.rebuild(mlp(32, 48, 16), surgery.structure(small))
    twice = surgery.rebuild(mlp(32, 48, 16), surgery.structure(again))
    again.load_state_dict(small.state_dict(), assign=True)
    assert surgery.structure(twice) == surgery.structure(small)
    assert_close(again(torch.ones(2, 32)), small(torch.ones(2, 32)))


def test_rebuild_needs_no_memory():
    """On the meta device the record gives empty layers of the right shapes."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 32), nn.Conv2d(8, 8, 3))
    small = factorize_low_rank(nn.Sequential(nn.Linear(64, 32), nn.Conv2d(8, 8, 3)))
    empty = surgery.rebuild(model, surgery.structure(small))
    assert all(p.device.type == "meta" for p in empty.parameters())
    assert [p.shape for p in empty.parameters()] == [p.shape for p in small.parameters()]


def test_ratio_one_changes_nothing():
    """ratio=1 returns an equal model without pairs."""
    model, x = mlp(64, 96, 32), data(64)
    same = factorize_low_rank(model, ratio=1, calibration=x)
    assert same is not model and not pairs_in(same)
    assert torch.equal(same(x[0]), model(x[0]))


def test_full_energy_changes_nothing():
    """All of the energy needs full rank, which is no smaller, so layers stay."""
    model, x = mlp(64, 96, 32), data(64)
    assert torch.equal(factorize_low_rank(model, energy=1.0, calibration=x)(x[0]), model(x[0]))


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


def test_calibration_beats_the_plain_svd():
    """On the data's distribution the calibrated model is closer, at the same ratio, also on unseen
    rows.
    """
    model = mlp(64, 128, 64)
    x = data(64, seed=0, batches=4)
    unseen = torch.cat(x[3:])
    plain, ours = factorize_low_rank(model), factorize_low_rank(model, calibration=x[:3])
    errors = [(m(unseen) - model(unseen)).square().mean().item() for m in (plain, ours)]
    assert errors[1] < 0.5 * errors[0]


class Residual(nn.Module):
    """x + first(x), then the same with second: no activation between, so what first loses can be
    made up for.
    """

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second, self.dropout = first, second, nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.first(x))
        return x + self.second(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_whole_layer_makes_up_for_the_stream(kind, bias):
    """After a cut layer of a residual stream, one that stays whole restores the model's output, not
    only its own.
    """
    torch.manual_seed(0)
    if kind == "linear":
        model = Residual(nn.Linear(32, 32, bias=bias), nn.Linear(32, 32, bias=bias)).eval()
        x = [torch.randn(256, 32) + 0.5 for _ in range(2)]
    else:
        model = Residual(nn.Conv2d(32, 32, 1, bias=bias), nn.Conv2d(32, 32, 1, bias=bias)).eval()
        x = [torch.randn(8, 32, 6, 6) + 0.5 for _ in range(2)]
    small = factorize_low_rank(model, ratio={"first": 0.4, "second": 1.0}, calibration=x)
    alone = factorize_low_rank(model, ratio={"first": 0.4}, calibration=x)
    assert list(pairs_in(small)) == ["first"] and torch.equal(
        alone.second.weight, model.second.weight
    )
    assert (small(x[0]) - model(x[0])).norm() < 1e-3 * (alone(x[0]) - model(x[0])).norm()


def test_layers_before_the_first_cut_keep_their_weights():
    """Whole layers are fitted only where something was lost before them."""
    model = mlp(64, 64, 64, 64)
    small = factorize_low_rank(model, ratio={"0": 1.0, "2": 0.4, "4": 1.0}, calibration=data(64))
    assert torch.equal(small[0].weight, model[0].weight) and not torch.equal(
        small[4].weight, model[4].weight
    )


def test_whole_layers_make_the_result_better():
    """At the same ranks, the model whose whole layers are fitted too is closer on unseen rows."""
    model, x = mlp(64, 128, 64, 64), data(64, batches=6)
    unseen = torch.cat(x[4:])
    ratios = {"0": 0.3, "2": 1.0, "4": 1.0}
    fitted, cut = (
        factorize_low_rank(model, ratio=r, calibration=x[:4]) for r in (ratios, {"0": 0.3})
    )
    assert torch.equal(fitted[0].first.weight, cut[0].first.weight)
    distances = [(m(unseen) - model(unseen)).square().mean().item() for m in (fitted, cut)]
    assert distances[0] < distances[1]


def test_streams_are_found():
    """An output joins a stream where it is added as it is to what doesn't come from it; scaled or
    normed ones don't.
    """

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.dropped, self.scaled, self.normed, self.doubled, self.cubed = (
                nn.Linear(8, 8) for _ in range(6)
            )
            self.norm, self.dropout = nn.LayerNorm(8), nn.Dropout()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.add(x, self.plain(x))
            x = self.dropout(self.dropped(x)) + x
            x = x + 0.5 * self.scaled(x)
            x = x + self.norm(self.normed(x))
            y, z = self.doubled(x), self.cubed(x)
            return x * (y + y) * (z + 0.04 * z**3)

    model = Parts().train()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert find_streams(model, torch.randn(3, 8), names) == {"plain", "dropped"}
    assert model.training and not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("name", "ends"),
    [("gpt2", "c_proj"), ("llama", "o_proj"), ("bert", "output.dense"), ("t5", ".o")],
)
def test_streams_of_foreign_models_are_found(name, ends):
    """In models that others wrote, the layers that write into the residual stream are known."""
    model, inputs = zoo(name)
    layers = {n: m for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    found = find_streams(model, inputs, layers)
    assert {n for n in layers if n.endswith(ends) and "pooler" not in n} <= found
    assert not any(n.endswith(("q_proj", "up_proj", "query", "c_attn", "c_fc")) for n in found)


def test_bias_keeps_the_mean_output():
    """The mean of the output on the calibration data is that of the original layer, at any rank."""
    model, x = mlp(64, 64), data(64)
    small = factorize_low_rank(model, rank=2, calibration=x)
    inputs = torch.cat(x)
    assert_close(small(inputs).mean(0), model(inputs).mean(0), factor=30)


def test_a_dict_touches_only_what_it_names():
    """Names and globs select layers and set each one's own value; the rest stays."""
    model = nn.Sequential(mlp(64, 64, 64), mlp(64, 64, 64))
    small = factorize_low_rank(model, rank={"0.*": 8, "1.2": 16}, calibration=data(64))
    assert {n: m.rank for n, m in pairs_in(small).items()} == {"0.0": 8, "0.2": 8, "1.2": 16}


def test_skip_and_summary():
    """Skipped layers stay, and the summary gives a rank or a reason for each layer."""
    model, _ = zoo("gpt2")
    small = factorize_low_rank(model, skip=("transformer.h.0",))
    notes = summary(small)
    assert not any(n.startswith("transformer.h.0") for n in pairs_in(small))
    assert notes["transformer.h.0.mlp.c_fc"] == "skipped by name"
    assert notes["lm_head"] == "shares its weight with 'transformer.wte'"
    assert notes["transformer.h.1.mlp.c_fc"].startswith("rank ")
    assert notes == summary(copy.deepcopy(small))


def test_a_second_pass_leaves_pairs_alone():
    """Factorizing a factorized model doesn't factorize the factors."""
    small = factorize_low_rank(mlp(64, 64, 64), rank={"0": 8})
    twice = factorize_low_rank(small, rank=8)
    assert list(pairs_in(twice)) == ["0", "2"] and twice[0].rank == 8


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2},
        {"padding": 2, "padding_mode": "circular"},
    ],
)
@pytest.mark.parametrize("split", ["channel", "spatial"])
def test_a_conv_pair_computes_its_dense_weight(options, split):
    """Both splits equal the one convolution with the weight they read as, for every padding, stride
    and dilation.
    """
    conv = nn.Conv2d(6, 10, (3, 5), **options)
    pair = LowRankConv2d(conv, 4, split, bias=True)
    for p in pair.parameters():
        nn.init.normal_(p)
    conv.weight.data, conv.bias.data = pair.dense_weight(), pair.bias.data
    x = torch.randn(2, 6, 14, 13)
    assert_close(pair(x), conv(x))


def test_auto_split_finds_separable_kernels():
    """Kernels that are columns times rows go to the spatial split, which reproduces them; others to
    the channel split.
    """
    torch.manual_seed(0)
    separable, mixing = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
    separable.weight.data = (
        torch.einsum("mrb,rcd->mcdb", torch.randn(16, 8, 3), torch.randn(8, 16, 3)) / 8
    )
    mixing.weight.data = (
        torch.einsum("mr,rcde->mcde", torch.randn(16, 4), torch.randn(4, 16, 3, 3)) / 8
    )
    x = [torch.randn(4, 16, 12, 12) for _ in range(2)]
    small = factorize_low_rank(
        nn.Sequential(separable, mixing), ratio={"0": 0.5, "1": 0.3}, calibration=x
    )
    assert [layer.split for layer in small] == ["spatial", "channel"]
    assert_close(small(x[0]), mixing(separable(x[0])), factor=100)
    assert {
        layer.split for layer in factorize_low_rank(nn.Sequential(separable), split="channel")
    } == {"channel"}


@pytest.mark.parametrize("limit", [0.8, 0.35, 0.0])
def test_layers_whose_pairs_are_slower_stay(monkeypatch, limit):
    """Ranks stay within the share of the parameters up to which pairs are fast; if there is none,
    it is an error.
    """
    monkeypatch.setattr(timing, "_KNOWN", {})
    monkeypatch.setattr(timing, "LONG_ENOUGH", 0.0)
    monkeypatch.setattr(
        timing,
        "_no_slower",
        lambda pair, layer, x: parameters(pair) <= 1.1 * limit * parameters(layer),
    )
    model = mlp(64, 96, 64)
    if limit == 0:
        with pytest.raises(ValueError, match="no pair is as fast as its layer"):
            factorize_low_rank(model, calibration=data(64))
        assert pairs_in(factorize_low_rank(model, calibration=data(64), only_faster=False))
        return
    small = factorize_low_rank(model, ratio=0.9, calibration=data(64))
    for name, pair in pairs_in(small).items():
        assert (
            parameters(pair) - pair.bias.numel() <= limit * model.get_submodule(name).weight.numel()
        )


def test_time_says_nothing_of_small_layers_unless_asked(monkeypatch):
    """A layer as quick as a call isn't judged by time, a large one is; explicit ranks aren't
    either.
    """
    monkeypatch.setattr(timing, "_KNOWN", {})
    monkeypatch.setattr(timing, "_no_slower", lambda *_: False)
    model, x = mlp(64, 64), data(64, rows=8)
    assert pairs_in(factorize_low_rank(model, calibration=x)) and pairs_in(
        factorize_low_rank(model, rank=8, calibration=x)
    )
    for options in ({"ratio": 0.5, "only_faster": True}, {"rank": 8, "only_faster": True}):
        with pytest.raises(ValueError, match="no pair is as fast"):
            factorize_low_rank(model, calibration=x, **options)
    with pytest.raises(ValueError, match="no pair is as fast"):
        factorize_low_rank(mlp(256, 256), calibration=data(256, rows=4096))


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


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "t5"])
def test_int8_works_inside_pairs(name):
    """Dynamic int8 turns both layers of each pair to int8 and changes little; sizes multiply."""
    model, inputs = zoo(name)
    small = factorize_low_rank(model, calibration=[inputs])
    both = in_int8(small)
    assert all(
        isinstance(p.first, Int8Linear) and isinstance(p.second, Int8Linear)
        for p in linear_pairs(both)
    )
    assert cosine(run(both, inputs), run(small, inputs)) > 0.99


def linear_pairs(model: nn.Module) -> list[LowRankLinear]:
    return [m for m in pairs_in(model).values() if isinstance(m, LowRankLinear)]


@pytest.mark.parametrize("name", ["llama", "resnet", "gpt2"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_save_and_load(name, suffix, tmp_path):
    """A file loaded into a fresh instance computes the same, for foreign models, int8 on top
    included.
    """
    model, inputs = zoo(name)
    small = factorize_low_rank(model, calibration=[inputs])
    for compressed in (small, in_int8(small)):
        quantize.save(compressed, tmp_path / f"model{suffix}")
        loaded = quantize.load(tmp_path / f"model{suffix}", model=zoo(name, seed=1)[0])
        assert_close(run(loaded, inputs), run(compressed, inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    """The pairs have the model's dtype and give its outputs to its precision."""
    model = mlp(64, 64).to(dtype)
    model[0].weight.data = (torch.randn(64, 8) @ torch.randn(8, 64) / 8).to(dtype)
    x = [b.to(dtype) for b in data(64)]
    small = factorize_low_rank(model, rank=8, calibration=x)
    assert all(p.dtype == dtype for p in small.parameters())
    coarse = torch.float32 if dtype == torch.float64 else dtype
    assert_close(small(x[0]), model(x[0]), dtype=coarse, factor=10)


@pytest.mark.parametrize("scale", [1e-15, 1e12, 1e19])
def test_inputs_of_any_size(scale):
    """Squares outside the range of float32 don't spoil the result."""
    model = mlp(64, 64)
    model[0].weight.data = torch.randn(64, 8) @ torch.randn(8, 64) / 8
    x = [b * scale for b in data(64)]
    assert_close(factorize_low_rank(model, rank=8, calibration=x)(x[0]), model(x[0]), factor=10)


def test_fused_encoder_layers_still_work():
    """torch's TransformerEncoder, whose fast path reads weights, gives the same with and without
    it, attention untouched.
    """
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu")
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 7, 64)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    small = factorize_low_rank(model, calibration=[{"src": x}])
    assert sorted(pairs_in(small)) == [f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)]
    assert "reads the weight" in summary(small)["layers.0.self_attn.out_proj"]
    with torch.no_grad():
        fast = small(x, src_key_padding_mask=padding)
    slow = small(x, src_key_padding_mask=padding)
    assert_close(fast[0], slow[0], factor=10)
    assert_close(fast[1, :5], slow[1, :5], factor=10)


def test_weight_reads_as_the_product():
    """Code that reads `.weight` of a pair gets the dense weight's type and shape, and the product
    in torch functions.
    """
    small = factorize_low_rank(mlp(64, 48), rank=8)[0]
    assert small.weight.shape == (48, 64) and small.weight.dtype == torch.float32
    x = torch.randn(3, 64)
    assert_close(nn.functional.linear(x, small.weight, small.bias), small(x))


def test_layers_that_run_several_times():
    """A module used twice is replaced at both places and fitted to all of its inputs."""
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.GELU(), shared).eval()
    small = factorize_low_rank(model, rank=16, calibration=data(64))
    assert isinstance(small[0], LowRankLinear) and small[0] is small[2]


def test_a_layer_that_joins_a_stream_at_its_second_call():
    """Calls of one layer are told apart: the first one's output goes elsewhere, the second one's is
    added.
    """

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x).relu()
            return y + self.layer(y)

    model = Twice()
    assert find_streams(model, data(64)[0], ["layer"]) == set()
    assert list(pairs_in(factorize_low_rank(model, calibration=data(64)))) == ["layer"]


def test_grouping_of_passes_is_only_a_matter_of_precision():
    """Few passes and little memory give a valid model of the same size."""
    model, x = mlp(64, 64, 64, 64), data(64)
    sizes = {
        parameters(factorize_low_rank(model, calibration=x, max_passes=passes, memory=memory))
        for passes in (1, 2, 64)
        for memory in (1, 1 << 30)
    }
    assert len(sizes) == 1


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


def test_pairs_script_trace_and_export():
    """A factorized model can be scripted, traced and exported."""
    small, x = factorize_low_rank(mlp(64, 64, 64), rank=8), torch.randn(2, 64)
    expected = small(x)
    assert_close(torch.jit.trace(small, x)(x), expected)
    assert_close(torch.export.export(small, (x,)).module()(x), expected)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"ratio": 0}, ValueError, "ratio=0 is outside"),
        ({"ratio": 1.5}, ValueError, "ratio=1.5 is outside"),
        ({"ratio": float("nan")}, ValueError, "ratio=nan is outside"),
        ({"ratio": "half"}, TypeError, "ratio must be a number"),
        ({"energy": -0.1}, ValueError, "energy=-0.1 is outside"),
        ({"rank": 0}, ValueError, "rank=0 is outside"),
        ({"rank": 4.5}, TypeError, "rank must be an int"),
        ({"rank": True}, TypeError, "rank must be an int"),
        ({"rank": 65}, ValueError, "rank=65 is above the rank 64 of layer '0'"),
        ({"ratio": 0.5, "rank": 8}, ValueError, "ratio=0.5 and rank=8"),
        ({"ratio": {"nothing": 0.5}}, ValueError, "'nothing'"),
        ({"ratio": 0.001}, ValueError, "ratio=0.001 leaves nothing"),
        ({"split": "rows"}, ValueError, "split is 'rows'"),
        ({"only_faster": True}, ValueError, "only_faster=True needs calibration"),
        ({"max_passes": 0, "calibration": data(64)}, ValueError, "max_passes=0"),
        ({"skip": ("0", "2")}, ValueError, "no layer to factorize"),
        ({"skip": ("zero",)}, ValueError, "'zero'"),
        ({"calibration": []}, ValueError, "empty"),
        ({"calibration": torch.ones(2, 64)}, TypeError, "calibration must be a sequence"),
        ({"calibration": [torch.full((2, 64), torch.inf)]}, ValueError, "not finite"),
        (
            {"calibration": [torch.ones(2, 5)]},
            ValueError,
            "doesn't run on the first batch of calibration",
        ),
    ],
)
def test_bad_input_is_refused_by_name(options, error, text):
    """Each mistake is an error that names the input and its value."""
    with pytest.raises(error, match=text):
        factorize_low_rank(mlp(64, 64, 64), **options)


class Experts(nn.Module):
    """Of two experts, one runs when asked; a third layer's weight is read by other code."""

    def __init__(self):
        super().__init__()
        self.used, self.idle, self.read = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, both: bool = False) -> torch.Tensor:
        y = nn.functional.linear(self.used(x), self.read.weight)
        return y + self.idle(x) if both else y


def test_layers_that_calibration_never_reaches_are_left():
    """A layer that no batch runs (a mixture's idle expert) stays, by name; an error only if nothing
    is left to do.
    """
    small = factorize_low_rank(Experts(), calibration=data(64))
    assert list(pairs_in(small)) == ["used"]
    left = quantize.summary(small).left
    assert "never reaches" in left["idle"] and "never reaches" in left["read"]
    with pytest.raises(ValueError, match="never reaches layer 'idle'"):
        factorize_low_rank(Experts(), calibration=data(64), rank={"idle": 8})


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


HARD = {
    "zeros": lambda: torch.zeros(64, 64),
    "ones": lambda: torch.ones(64, 64),
    "large": lambda: torch.full((64, 64), 1e8),
    "one row": lambda: data(64)[0][:1],
    "rank 5": lambda: torch.randn(64, 5) @ torch.randn(5, 64),
    "dead thirds": lambda: data(64)[0] * (torch.arange(64) % 3 > 0),
    "scales": lambda: data(64)[0] * torch.logspace(-8, 6, 64),
    "a mean of 1e4": lambda: data(64)[0] + 1e4,
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", HARD)
def test_inputs_of_little_rank(kind, bias):
    """Inputs that are equal, zero, dead or of unlike sizes give finite weights, and what they gave
    stays.
    """
    model, x = mlp(64, 96, 64, bias=bias), HARD[kind]()
    small = factorize_low_rank(model, rank=24, calibration=[x, x])
    assert all(p.isfinite().all() for p in small.parameters())
    away = lambda m: ((m(x) - model(x)).norm() / model(x).norm().clamp(min=1e-30)).item()  # noqa: E731
    assert away(small) < max(1e-3, 0.7 * away(factorize_low_rank(model, rank=24)))


def test_constant_inputs_leave_a_whole_layer_as_it_is():
    """Behind a cut layer, a whole one whose inputs never vary keeps its weight and gives the right
    output.
    """
    model, x = mlp(64, 64, 64), [torch.ones(8, 64)]
    small = factorize_low_rank(model, ratio={"0": 0.4, "2": 1.0}, calibration=x)
    assert_close(small(x[0]), model(x[0]), factor=10)
    assert_close(small[2].weight, model[2].weight, factor=100)


def test_progress_names_layers():
    """Calibrated low rank says what it does, layer by layer."""
    lines: list[str] = []
    factorize_low_rank(mlp(64, 64, 64), calibration=data(64), progress=lines.append)
    assert any("gradients of 0, 2" in line for line in lines) and any(
        "fitting 2 (2/2)" in line for line in lines
    )


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(64, 128, batch_first=True), nn.Linear(128, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0])


def test_little_touched_is_said():
    """Where most of a model stays, a warning and the notes say how little was touched, and what
    holds the rest.
    """
    with pytest.warns(
        UserWarning, match=r"hold 4% of the parameters of Recurrent; the rest: LSTM \(96%\)"
    ):
        small = factorize_low_rank(Recurrent())
    (step,) = quantize.summary(small).steps
    assert step.done == {"head": "rank 12 of 32"} and "LSTM isn't factorized" in step.left["lstm"]
    assert (
        step.settings["share_touched"] == pytest.approx(0.04, abs=0.003) and step.distance is None
    )


def test_notes():
    """The notes have what was done, what was left, and the distance on the first batch of
    calibration.
    """
    model, x = mlp(64, 128, 64), data(64)
    small = factorize_low_rank(model, rank={"0": 16}, calibration=x)
    (step,) = quantize.summary(small).steps
    assert (step.technique, step.done) == ("low_rank", {"0": "rank 16 of 64"})
    assert step.distance == pytest.approx(
        ((small(x[0]) - model(x[0])).norm() / model(x[0]).norm()).item(), rel=1e-4
    )


@pytest.mark.parametrize(
    "make", [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.orthogonal]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_layers_whose_weight_is_computed_are_left(make):
    """Under a parametrization, old or new, a layer stays, by name."""
    model = mlp(64, 64, 64)
    model[0] = make(model[0])
    for calibration in (None, data(64)):
        small = factorize_low_rank(model, calibration=calibration)
        assert (
            list(pairs_in(small)) == ["2"]
            and "weight is computed" in quantize.summary(small).left["0"]
        )


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


def test_weights_that_are_not_finite_name_the_layer():
    """NaN in a weight is an error with the layer's name."""
    model = mlp(64, 64, 64)
    model[2].weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match="layer '2' has weights that are not finite"):
        factorize_low_rank(model)
    with pytest.raises(ValueError, match=r"'0'.*no shape yet"):
        factorize_low_rank(nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8)))


def test_models_without_layers_are_refused():
    """A model with nothing to factorize is an error that says what was looked for."""
    with pytest.raises(ValueError, match="looked for"):
        factorize_low_rank(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)))
