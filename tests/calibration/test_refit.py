"""Least squares against what it must find, and what it must leave."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, randn

from quantize.calibration import (
    InputStatistics,
    Outer,
    PairedStatistics,
    Regression,
    compensate,
    compensate_rows,
    least_squares,
    refit,
)
from quantize.calibration.solve import PLAIN_RIDGE


def rows(inputs: int, outputs: int, mean: float, count: int = 400) -> tuple[torch.Tensor, ...]:
    x = randn(count, inputs) + mean
    return x, randn(outputs, inputs, seed=1), randn(outputs, seed=2)


@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize("outputs", [5, 300])
def test_a_linear_map_is_found(outputs, mean):
    """Weight and bias of a map without noise, also off zero and for very many outputs."""
    x, weight, bias = rows(12, outputs, mean)
    regression = Regression(bias=True)
    for part in x.double().split(100):
        regression.add(part, part @ weight.double().T + bias.double())
    found, constant = regression.fit(torch.zeros_like(weight))
    assert_close(found, weight.double(), dtype=torch.float32, factor=10)
    assert_close(constant, bias.double(), dtype=torch.float32, factor=100 * max(1.0, mean))


def test_directions_without_data_keep_what_they_had():
    """Where an input never varies from zero, its column stays that of the start."""
    x, weight, _ = rows(12, 5, 0.0)
    x[:, 7:] = 0
    start = randn(5, 12, seed=3)
    regression = Regression(bias=False)
    regression.add(x, x @ weight.T)
    found, constant = regression.fit(start)
    assert constant is None
    assert torch.equal(found[:, 7:], start[:, 7:].double())
    assert_close(found[:, :7].float(), weight[:, :7], factor=100)


def test_noise_is_not_fitted():
    """Of targets that are noise, less is fitted than by plain least squares."""
    x, y, start = randn(40, 30), randn(40, 6, seed=4), torch.zeros(6, 30)
    regression = Regression(bias=False)
    regression.add(x, y)
    plain = torch.linalg.lstsq(x, y).solution
    assert regression.fit(start)[0].norm() < 0.5 * plain.norm()


def test_few_rows_are_fitted_as_many_are():
    """The dual form gives what the moments of the same rows give, with a bias and without."""
    for bias in (False, True):
        x, y, start = randn(40, 60) + 1, randn(40, 6, seed=4), randn(6, 60, seed=5) / 60
        few, summed = Regression(bias=bias), Regression(bias=bias)
        few.add(x.double(), y.double())
        assert few.few is not None
        summed.few = None
        summed.add(x.double(), y.double())
        weight, constant = few.fit(start)
        expected, expected_constant = summed.fit(start)
        assert_close(weight, expected, dtype=torch.float32)
        if bias:
            assert_close(constant, expected_constant, dtype=torch.float32)


def test_rows_of_very_many_inputs_are_thinned(monkeypatch):
    """Past a number of inputs a part of the rows stays, and what all obey is found from those."""
    monkeypatch.setattr(refit, "WIDEST", 16)
    monkeypatch.setattr(refit, "MOST_ROWS", 100)
    x, weight, bias = rows(20, 5, 2.0)
    regression = Regression(bias=True)
    for part in x.double().split(50):
        regression.add(part, part @ weight.double().T + bias.double())
    assert 100 // 3 <= regression.count <= 100
    found, constant = regression.fit(torch.zeros_like(weight))
    assert_close(found, weight.double(), dtype=torch.float32, factor=100)
    assert_close(constant, bias.double(), dtype=torch.float32, factor=1000)


def test_a_moment_without_a_factor_gets_the_ridge_that_it_takes():
    """Roundings leave a moment of few rows with eigenvalues below zero: the fit goes on, near."""
    torch.manual_seed(0)
    few, start = torch.randn(4, 20).double(), torch.randn(3, 20).double()
    moment = few.T @ few - 1e-4 * torch.eye(20, dtype=torch.float64)
    target = torch.randn(3, 20).double()
    weight = least_squares(moment, target @ few.T @ few, start, 1e-9)
    assert_close(weight @ few.T, target @ few.T, dtype=torch.float32, factor=1e3)


@pytest.mark.parametrize("centred", [False, True])
def test_moments_of_few_rows_are_those_of_their_squares(centred):
    """What is asked of a moment is the same of rows that still wait and of their summed product,
    also where rows stand for several; and so are weights that are compensated with either.
    """
    few, summed = PairedStatistics(), PairedStatistics()
    for seed, count in ((1, 5), (2, 7)):
        x, z = randn(count, 20, seed=seed).double() + 1, randn(count, 6, seed=seed + 2).double()
        few.update_pair(x, z)
        summed.update_pair(x, z)
    summed.squares.flush()
    rows, matrix = (seen.moment(centred=centred, floor=0.1) for seen in (few, summed))
    assert isinstance(rows, Outer) and isinstance(matrix, torch.Tensor)
    left = randn(3, 20).double()
    assert_close(rows.whole(), matrix)
    assert_close(rows.times(left, 0.5), left @ (matrix + 0.5 * torch.eye(20)))
    assert_close(rows.power, matrix.diagonal().mean())
    assert_close(rows.squares, matrix.square().sum())
    root = rows.inverse_rows()
    assert_close((torch.eye(20) - root.T @ root) / rows.floor, torch.linalg.inv(matrix))
    weight = randn(6, 20, seed=5).double()
    x, z = few.few_rows(centred=centred)
    cross = summed.cross_covariance if centred else summed.cross_moment
    first = torch.zeros(12, dtype=torch.bool)  # no half to try ridges on
    expected = compensate(weight, matrix, cross + 0.1 * weight, ridge=PLAIN_RIDGE / 2)
    gap = z - x @ weight.T
    assert_close(compensate_rows(weight, rows, gap, first, centred=centred), expected)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("true", [False, True])
def test_few_rows_are_followed_as_far_as_others_agree(centred, true):
    """Gaps of 32 rows of 64 inputs that are noise change next to nothing on other rows; gaps that a
    weight makes, on inputs of 8 directions, are closed on other rows too.
    """
    every = randn(64, 8) @ randn(8, 64, seed=1) if true else randn(64, 64)
    x, others = every.double().split(32)
    weight, map_ = randn(16, 64, seed=2).double(), randn(16, 64, seed=3).double()
    gap = x @ map_.T if true else randn(32, 16, seed=4).double()
    if centred:
        x, gap = x - x.mean(0), gap - gap.mean(0)
    half = torch.arange(32) < 16
    moment = Outer(x / 32**0.5)
    found = compensate_rows(weight, moment, gap / 32**0.5, half, centred=centred)
    change = others @ (found - weight).T
    if true:
        assert (change - others @ map_.T).norm() < 0.02 * (others @ map_.T).norm()
    else:
        assert change.norm() < 0.1 * gap.norm()


def test_rows_that_stand_for_several_keep_their_share():
    """A moment of waiting samples is that of the rows that they stand for."""
    x = randn(6, 20).double() + 1
    seen = InputStatistics()
    seen.update(x[:4])
    seen.update(x[4:], 6)
    every = torch.cat([x[:4], x[4:], x[4:], x[4:]])
    for centred in (False, True):
        moment = seen.moment(centred=centred)
        less = every - every.mean(0) if centred else every
        assert_close(moment.whole(), less.T @ less / len(every))
