"""Statistics of inputs, patches and gradients against their definitions."""

from __future__ import annotations

import itertools

import pytest
import torch
from calibration_models import gradient_moments
from helpers import assert_close, randn
from torch import nn

from quantize import calibration
from quantize.calibration import squares
from quantize.calibration.patches import FEWEST_PATCHES, rows, sample, symmetric, upper_gram
from quantize.calibration.squares import Squares
from quantize.calibration.sums import PairedStatistics


def test_moments_are_means_over_all_rows(model, batches):
    """count, mean, second moment and largest value are those of the concatenated inputs."""
    seen = calibration.collect(model, batches, {"a": model.a})["a"]
    x = torch.cat([b.reshape(-1, 6) for b in batches]).double()
    assert seen.count == len(x)
    assert_close(seen.mean, x.mean(0), dtype=torch.float32)
    assert_close(seen.second_moment, x.T @ x / len(x), dtype=torch.float32)
    assert_close(seen.largest, x.abs().amax(0), dtype=torch.float32)


def test_layers_on_one_input_share_its_product(model, batches, monkeypatch):
    """The second moment of a tensor is computed once a call, whoever reads it, and is each reader's
    own afterwards.
    """
    products = []

    def counted(x):
        products.append(x)
        return upper_gram(x)

    monkeypatch.setattr("quantize.calibration.sums.upper_gram", counted)
    layers = {name: getattr(model, name) for name in "abc"}
    seen = calibration.collect(model, batches, layers)
    assert len(products) == 2 * len(batches)  # as many rows as columns in each
    alone = calibration.collect(model, batches, {"b": model.b})["b"]
    assert torch.equal(seen["b"].second_moment, alone.second_moment)
    seen["a"].update(batches[0].reshape(-1, 6))
    assert torch.equal(seen["b"].second_moment, alone.second_moment)


def test_rows_of_small_batches_wait_for_each_other():
    """Products are summed when there are as many rows as columns, and when the sum is asked for."""
    generator = torch.Generator().manual_seed(2)
    parts = [torch.randn(n, 8, generator=generator) for n in (3, 3, 9, 3)]
    total = Squares()
    for part in parts:
        total.add(part, 4.0)
    assert total.count == 3 + 3 + 9 + 3 - 15
    rows = 2 * torch.cat(parts)
    assert_close(total.whole(), rows.T @ rows)
    assert_close(total.diagonal(), rows.square().sum(0))


def test_batches_of_many_rows_are_summed_at_once():
    """Half as many rows as columns are worth a product, and fewer wait beside it."""
    total, waiting = Squares(), []
    parts = [randn(n, 8, seed=n) for n in (3, 4, 2, 3)]
    for part in parts:
        total.add(part)
        waiting.append(total.count)
    assert waiting == [3, 3, 5, 0]
    rows = torch.cat(parts)
    assert_close(total.diagonal(), rows.square().sum(0))
    assert_close(total.whole(), rows.T @ rows)


def test_of_rows_too_wide_for_a_product_some_stand_for_all(monkeypatch):
    """They stay rows, within a number, beside those that they are paired with; what all rows share
    is found exactly, and what differs nearly.
    """
    monkeypatch.setattr(squares, "MOST_NUMBERS", 400)
    seen, alone = PairedStatistics(), Squares()
    towards = randn(3, 30, seed=1).double()
    parts = [randn(n, 30, seed=n).double() for n in (20, 1, 45, 33, 7)]
    for part in parts:
        seen.update_pair(part, part @ towards.T)
        alone.add(part)
    assert alone.count * 30 <= 400 and not alone.strips
    assert sum(each * len(part) for part, each in alone.waiting) == pytest.approx(106)
    x, z = seen.few_rows(centred=False)
    assert len(x) == alone.count
    assert_close(z, x @ towards.T)
    moment = seen.moment(centred=False)
    assert_close(moment.rows, x)
    whole = torch.cat(parts)
    assert moment.power == pytest.approx(float(whole.square().mean()), rel=0.1)
    one = Squares()
    for _ in range(5):
        one.add(torch.ones(9, 30))
    assert_close(one.whole(), torch.full((30, 30), 45.0))


def test_an_input_that_changed_in_place_is_not_shared():
    """Two layers read one tensor, which is written to in between."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x):
            y = self.a(x)
            x.abs_()
            return y + self.b(x)

    model, x = InPlace(), torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    seen = calibration.collect(model, [x], {"a": model.a, "b": model.b})
    for name, given in (("a", x.double()), ("b", x.abs().double())):
        assert_close(seen[name].second_moment, given.T @ given / 8, dtype=torch.float32)


@pytest.mark.parametrize("width", [7, 1024, 1500])
def test_gram_is_the_product_with_itself(width):
    """Whatever the width, and symmetric to the last bit where half of it is a copy."""
    x = torch.randn(9, width, generator=torch.Generator().manual_seed(1))
    product = symmetric(upper_gram(x))
    assert_close(product, x.double().T @ x.double(), dtype=torch.float32)
    assert torch.equal(product, product.T)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(2, 4, 3, padding=1), (4, 2, 40, 40)),
        (nn.Conv2d(2, 4, 3, stride=2, dilation=2, padding="valid"), (8, 2, 60, 50)),
        (nn.Conv1d(3, 4, 5, padding="same", padding_mode="circular"), (3, 900)),
    ],
)
def test_many_patches_are_sampled_from_a_grid(layer, shape):
    """The sample is of patches at every so many outputs, and counts for all of them."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    outputs = layer(x)
    patches, count = sample(layer, x)
    spatial = len(layer.kernel_size)
    assert count == outputs.numel() // layer.out_channels
    assert len(patches) <= max(FEWEST_PATCHES, 2 * patches.shape[1])
    every = next(e for e in itertools.count(1) if len(rows(layer, x, every=e)) == len(patches))
    grid = outputs[(..., *[slice(None, None, every)] * spatial)]
    channel = grid.ndim - 1 - spatial
    expected = grid.movedim(channel, -1).reshape(-1, layer.out_channels)
    assert_close(patches @ layer.weight.flatten(1).T + layer.bias, expected, factor=10)
    seen = calibration.collect(layer, [x], {"": layer})[""]
    assert seen.count == count
    mean = patches.double().T @ patches.double() / len(patches)
    assert_close(seen.second_moment, mean, dtype=torch.float32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1, "stride": 2},
        {"padding": "same", "dilation": 2},
        {"padding": (1, 2), "padding_mode": "reflect"},
    ],
)
def test_rows_times_the_weight_are_the_convolution(options):
    """rows(conv, x) @ weight^T is what the convolution computes, for every padding, stride and
    dilation.
    """
    conv = nn.Conv2d(3, 4, (3, 5), bias=False, **options)
    x = torch.randn(2, 3, 12, 11)
    y = conv(x).movedim(1, -1).reshape(-1, 4)
    assert_close(calibration.rows(conv, x) @ conv.weight.flatten(1).T, y)


@pytest.mark.parametrize("size", [1e-20, 1e18, 1e25])
def test_tiny_and_huge_inputs_stay_finite(model, size):
    """Squares beyond the range of float32 are summed in float64."""
    x = torch.randn(8, 6) * size
    seen = calibration.collect(nn.Sequential(model.b), [x], {"0": model.b})["0"]
    if size > 1:
        assert_close(seen.second_moment, x.double().T @ x.double() / 8, dtype=torch.float32)
    assert torch.isfinite(seen.second_moment).all()


def test_half_precision_inputs_are_summed_in_float32(model):
    """Squares of large fp16 values don't overflow."""
    layer = model.b.half()
    seen = calibration.collect(
        nn.Sequential(layer), [torch.full((4, 6), 3e3, dtype=torch.float16)], {"0": layer}
    )["0"]
    assert_close(seen.second_moment, torch.full((6, 6), 9e6), dtype=torch.float16)


def test_gradient_moments_are_those_of_autograd(model, batches):
    """E[g g^T] of a given loss equals what autograd gives for the layer's outputs, in-place
    activations included.
    """
    moments = gradient_moments(model, batches, {"a": model.a}, lambda y: y.square().sum())
    expected = torch.zeros(5, 5)
    for b in batches:
        a = model.a(b).detach().requires_grad_()
        model.c(torch.relu(a + model.b(b))).square().sum().backward()
        expected += a.grad.reshape(-1, 5).T @ a.grad.reshape(-1, 5)
    assert_close(moments["a"], expected / sum(b[..., 0].numel() for b in batches))


def test_gradients_before_an_in_place_activation():
    """The gradient is that of the layer's own output, not of what an in-place layer wrote over
    it.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    x = torch.randn(64, 4)
    moment = gradient_moments(model, [x], {"0": model[0]}, torch.sum)["0"]
    on = (model[0](x) > 0).float()
    assert_close(moment, on.T @ on / 64)


def test_fisher_loss_gives_the_fisher_information():
    """With labels drawn from the model, E[g g^T] at the logits approaches diag(p) - p p^T."""
    logits = torch.tensor([0.3, -1.0, 1.2]).expand(40_000, 3).clone().requires_grad_()
    calibration.fisher_loss(
        logits, categories=True, generator=torch.Generator().manual_seed(0)
    ).backward()
    p = logits[0].detach().softmax(-1)
    assert_close(logits.grad.T @ logits.grad / len(logits), p.diag() - p[:, None] * p, factor=2e3)


def test_layers_without_influence_are_missing(model, batches):
    """A layer that the loss doesn't depend on is left out; frozen parameters don't hide one that it
    does.
    """
    model.requires_grad_(False)
    layers = {"a": model.a, "rare": model.rare}
    both = [(batch, True) for batch in batches]
    assert set(gradient_moments(model, both, layers)) == {"a", "rare"}
    assert set(gradient_moments(model, batches, layers)) == {"a"}
    assert gradient_moments(model, batches, layers, lambda _: torch.ones(())) == {}
