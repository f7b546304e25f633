"""Low rank: what is said of each layer, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import zoo
from low_rank_models import data, mlp, pairs_in, parameters
from torch import nn

import quantize
from quantize.compression.low_rank import factorize_low_rank, timing


def test_skip_and_summary():
    """Skipped layers stay, and the summary gives a rank or a reason for each layer."""
    model, _ = zoo("gpt2")
    small = factorize_low_rank(model, skip=("transformer.h.0",))
    (step,) = quantize.summary(small).steps
    notes = step.done | step.left
    assert not any(n.startswith("transformer.h.0") for n in pairs_in(small))
    assert notes["transformer.h.0.mlp.c_fc"] == "skipped by name"
    assert notes["lm_head"] == "shares its weight with 'transformer.wte'"
    assert notes["transformer.h.1.mlp.c_fc"].startswith("rank ")
    assert quantize.summary(copy.deepcopy(small)).steps == (step,)


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
        lambda pair, layer, *_: parameters(pair) <= 1.1 * limit * parameters(layer),
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

    def seconds(modules, x, _):
        """Made up: a nanosecond per product, and a pair takes twice as long as its layer."""
        layer = modules[-1]
        alone = 1e-9 * x.shape[0] * layer.weight.numel()
        return [2.0 * alone, alone][-len(modules) :]

    monkeypatch.setattr(timing, "_KNOWN", {})
    monkeypatch.setattr(timing, "LONG_ENOUGH", 1e-4)
    monkeypatch.setattr(timing, "_seconds", seconds)
    model, x = mlp(64, 64), data(64, rows=8)
    assert pairs_in(factorize_low_rank(model, calibration=x)) and pairs_in(
        factorize_low_rank(model, rank=8, calibration=x)
    )
    for options in ({"ratio": 0.5, "only_faster": True}, {"rank": 8, "only_faster": True}):
        with pytest.raises(ValueError, match="no pair is as fast"):
            factorize_low_rank(model, calibration=x, **options)
    with pytest.raises(ValueError, match="no pair is as fast"):
        factorize_low_rank(mlp(256, 256), calibration=data(256, rows=4096))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"ratio": 0}, ValueError, "ratio is 0; allowed"),
        ({"ratio": 1.5}, ValueError, "ratio is 1.5; allowed"),
        ({"ratio": float("nan")}, ValueError, "ratio is nan; allowed"),
        ({"ratio": "half"}, TypeError, "ratio must be a number"),
        ({"rank": 0}, ValueError, "rank is 0; allowed"),
        ({"rank": 4.5}, ValueError, "rank is 4.5; allowed"),
        ({"rank": True}, ValueError, "rank is True; allowed"),
        ({"rank": 65}, ValueError, "rank=65 is above the rank 64 of layer '0'"),
        ({"ratio": 0.5, "rank": 8}, ValueError, "ratio=0.5 and rank=8"),
        ({"ratio": {"nothing": 0.5}}, ValueError, "'nothing'"),
        ({"ratio": 0.001}, ValueError, "ratio=0.001 leaves nothing"),
        ({"only_faster": True}, ValueError, "only_faster=True needs calibration"),
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


def test_progress_names_layers():
    """Calibrated low rank says what it does, layer by layer."""
    lines: list[str] = []
    factorize_low_rank(mlp(64, 64, 64), calibration=data(64), progress=lines.append)
    assert any("inputs of 0, 2" in line for line in lines) and any(
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
