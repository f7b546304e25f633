"""Low rank with calibration: what the data adds, and whole layers that make up for a stream."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from helpers import assert_close, zoo
from low_rank_models import data, mlp, pairs_in, parameters
from torch import nn

import quantize
from quantize.calibration import Projected, Survey, find_streams
from quantize.compression.low_rank import factorize_low_rank
from quantize.compression.low_rank.spectra import spectra
from quantize.nn.low_rank import LowRankLinear, matrix


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


def test_few_rows_of_calibration_are_no_worse_than_none():
    """Directions that few rows don't show are kept as plain SVD keeps them; and it is said."""
    model, rows = mlp(96, 192, 16), data(96, rows=6, batches=1)
    (unseen,) = data(96, batches=1, seed=1)
    with torch.no_grad():
        expected = model(unseen)
        errors = [
            (quantize.factorize_low_rank(model, calibration=given)(unseen) - expected).norm()
            for given in (None, rows)
        ]
    assert errors[1] <= errors[0]
    with pytest.warns(UserWarning, match="calibration gives '0' 6 rows for its 96 inputs, and 1"):
        quantize.factorize_low_rank(model, calibration=rows)


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


def test_grouping_of_passes_is_only_a_matter_of_precision(monkeypatch):
    """Few passes and little memory give a valid model of the same size."""
    model, x = mlp(64, 64, 64, 64), data(64)
    sizes = set()
    for steps, memory in product((1, 2, 64), (1, 1 << 30)):
        monkeypatch.setattr("quantize.compression.low_rank.fit.MOST_STEPS", steps)
        sizes.add(parameters(factorize_low_rank(model, calibration=x, memory=memory)))
    assert len(sizes) == 1


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


class Shapes(nn.Module):
    """Layers that are wider in, wider out, and convolutions."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 8, 3, stride=2, bias=bias)
        self.wide = nn.Conv2d(8, 24, 1, bias=bias)
        self.up = nn.Linear(24, 40, bias=bias)
        self.down = nn.Linear(40, 10, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wide(self.cut(x).relu()).relu()
        return self.down(input=self.up(input=x.movedim(1, -1)).relu())


@pytest.mark.parametrize(("bias", "rows"), [(True, 6), (False, 6), (True, 1), (False, 1)])
def test_spectra_are_those_of_whole_moments(bias, rows):
    """What outputs and gradients at inputs tell of a layer's wider side is all that a spectrum
    asks of it; of few rows the moments themselves are asked.
    """
    torch.manual_seed(2)
    model = Shapes(bias).eval()
    size = 15 if rows > 1 else 7
    batches = [torch.randn(rows, 3, size, size) + 0.3 for _ in range(2)]
    layers = dict(model.named_children())
    widths = {name: tuple(reversed(matrix(layer).shape)) for name, layer in layers.items()}
    projected = {name: matrix(layer) for name, layer in layers.items() if name != "wide"}
    found = []
    for narrow in ({}, projected):
        survey = Survey(model, batches, widths, projected=narrow)
        found.append(spectra(layers, survey))
        known = survey.gradient("up"), survey.inputs("down").moment(centred=bias)
        kinds = [isinstance(moment, Projected) for moment in known]
        assert kinds == [bool(narrow), bool(narrow) and rows > 1]
    for name in layers:
        assert_close(found[1][name], found[0][name], dtype=torch.float32, factor=10)
