"""Low rank: the formulas against oracles, tensors only."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.calibration import Outer, Projected, compensate
from quantize.compression.low_rank import maths, spatial


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


shapes = st.tuples(st.integers(1, 24), st.integers(1, 24))


@settings(max_examples=40)
@given(shape=shapes, whiten=st.booleans(), weigh=st.booleans(), deficient=st.booleans())
def test_full_rank_reproduces_the_weight(shape, whiten, weigh, deficient):
    """At full rank second @ first is the weight, whatever the moments, rank-deficient ones
    included.
    """
    m, k = shape
    weight = torch.randn(m, k, generator=torch.Generator().manual_seed(m * k)).double()
    rows_of_s, rows_of_g = (max(1, n // 3) if deficient else 3 * n for n in (k, m))
    s = moment(k, rows_of_s) if whiten else None
    g = moment(m, rows_of_g, seed=1) if weigh else None
    first, second, _ = maths.whitened_svd(weight, s, g)
    assert_close(second @ first, weight, dtype=torch.float32)


@settings(max_examples=40)
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
    fixed = compensate(weight, x.T @ x / 300, weight @ r.T @ x / 300, ridge=1e-12)
    assert_close(fixed, weight @ torch.linalg.inv(distort), dtype=torch.float32)
    assert_close(compensate(weight, r.T @ r, weight @ r.T @ r), weight)


def test_compensation_adds_what_is_asked_for():
    """If the layer is to give W r + D x beside inputs x = r, the compensated weight is W + D."""
    weight, more, r = (
        torch.randn(5, 8).double(),
        torch.randn(5, 8).double(),
        torch.randn(300, 8).double(),
    )
    s = r.T @ r / 300
    assert_close(
        compensate(weight, s, (weight + more) @ s, ridge=1e-12),
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
    first, second, product = spatial.spatial_factors(kernel, s, rank=min(c * kh, m * kw))
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
    first, second, product = spatial.spatial_factors(kernel, s, rank=3)
    best = maths.weighted_error(kernel.flatten(1) - product, s, None)
    for _ in range(5):
        other = torch.einsum("mrab,rcde->mcdb", second + 1e-3 * torch.randn_like(second), first)
        assert maths.weighted_error((kernel - other).flatten(1), s, None) > best


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (60, 4, 3, 3)])
def test_moments_given_as_rows_do_as_well(shape):
    """Factors, spectrum, spatial factors and error are those of the moment that the rows make."""
    rows = torch.randn(20, 36, generator=torch.Generator().manual_seed(1)).double()
    outer = Outer(rows, 0.1)
    moments = (outer, outer.whole())
    gradient, weight = moment(shape[0], 70), torch.randn(shape).double()
    matrix = weight.flatten(1)
    given, expected = (maths.whitened_svd(matrix, s, gradient, rank=3) for s in moments)
    assert_close(given.spectrum, expected.spectrum, factor=1e3)
    assert_close(given.second @ given.first, expected.second @ expected.first, factor=1e3)
    given, expected = (spatial.spatial_factors(weight, s, gradient, rank=3) for s in moments)
    assert_close(given[2], expected[2], factor=1e3)
    errors = [maths.weighted_error(matrix, s, gradient) for s in moments]
    assert errors[0] == pytest.approx(errors[1], rel=1e-9)


@pytest.mark.parametrize("shape", [(20, 36), (36, 20)])
def test_projected_moments_do_as_well(shape):
    """Of the larger side's moment, the spectrum of a weight asks only what that weight shows of it;
    so do the factors of a weight that mixes its rows, or on the other side its columns.
    """
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    inputs, gradient = moment(shape[1], 70), moment(shape[0], 70)
    moments, projected = [inputs, gradient], [inputs, gradient]
    flat = shape[0] < shape[1]
    narrow, wide = (weight, inputs) if flat else (weight.T, gradient)
    power = float(wide.diagonal().mean())
    projected[not flat] = Projected(narrow, narrow @ wide @ narrow.T, power)
    given, expected = (maths.whitened_spectrum(weight, *pair) for pair in (projected, moments))
    assert_close(given, expected, factor=1e3)
    mix = torch.randn(20, 20).double()
    other = mix @ weight if flat else weight @ mix
    given, expected = (maths.whitened_svd(other, *pair, rank=5) for pair in (projected, moments))
    assert_close(given.second @ given.first, expected.second @ expected.first, factor=1e3)


def test_a_projected_moment_counts_its_mean_power_in_directions_it_does_not_show():
    """Rows at right angles to the weight's have the mean power."""
    weight, left = torch.eye(3, 8).double(), torch.eye(8).double()[2:5]
    given = Projected(weight, torch.diag(torch.tensor([5.0, 6.0, 7.0])).double(), 2.0)
    expected = torch.diag(torch.tensor([7.0, 2.0, 2.0])).double() + 0.5 * torch.eye(3)
    assert_close(given.between(left, 0.5), expected)
