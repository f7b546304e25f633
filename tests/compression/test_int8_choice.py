"""Which layers int8 takes: what is skipped, slower, inexact or without a form in int8 stays."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from helpers import in_int8, linear, mlp, randn
from int8_models import races, timings
from torch import nn

import quantize
from quantize import quantize_dynamic
from quantize.compression.int8 import speed


def test_skip_and_summary():
    """A skipped layer stays what it was, and the summary says why."""
    model = mlp(24, 40, 8)
    small = in_int8(model, skip=("2",))
    assert type(small[2]) is nn.Linear
    (step,) = quantize.summary(small).steps
    assert step.done == {"0": "int8", "1": "folded into 0"}
    assert list(step.left) == ["2"] and step.left["2"].startswith("named by skip")


def test_what_cannot_be_quantized_is_named():
    """No linear, an already quantized model, weights that are not finite, and a skip that is no
    module.
    """
    with pytest.raises(ValueError, match="no layer left"):
        in_int8(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="already quantized"):
        in_int8(in_int8(mlp(24, 40, 8)))
    bad = mlp(24, 40, 8)
    with torch.no_grad():
        bad[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="'2' has a weight that is not finite"):
        in_int8(bad)
    with pytest.raises(ValueError, match="head"):
        in_int8(mlp(24, 40, 8), skip=("head",))
    with pytest.raises(TypeError, match=r"nn\.Module"):
        in_int8([1])


class Lasting(nn.Module):
    """Its values say how many rows it gives, as those of a speech model say how long a sound is."""

    def __init__(self):
        super().__init__()
        self.layer = linear(24, 8)

    def forward(self, x):
        y = self.layer(x)
        return y[: 1 + int(1e4 * y.abs().sum()) % len(y)]


def test_outputs_of_other_shapes_are_refused_by_name():
    """Where int8 changes how long an output is, calibration can't say how far it moved."""
    with pytest.raises(ValueError, match="the int8 Lasting can't be compared: its outputs have"):
        in_int8(Lasting(), calibration=[randn(50, 24)])


def test_slower_layers_stay_in_float(monkeypatch: pytest.MonkeyPatch):
    """By default a layer that the stopwatch finds slower in int8 stays, with both times, and what
    shares its weight stays too; prefer="size" converts it.
    """
    shapes = timings(monkeypatch)
    races(monkeypatch, *[[0.1, 0.05]] * 2)
    model = nn.Sequential(linear(4, 4), linear(4, 512), linear(512, 512)).eval()
    (step,) = quantize.summary(quantize_dynamic(model)).steps
    slow = "int8 is slower here: 10.0 us against 1.0 for 1 x 4"
    assert step.left["0"].startswith(slow) and step.done == {"2": "int8"}
    assert shapes[:3] == [(1, 4), (16, 4), (256, 4)]
    assert len(quantize.summary(in_int8(model)).done) == 3
    tied = nn.Sequential(nn.Embedding(8, 4), linear(4, 8, bias=False), linear(8, 9000)).eval()
    tied[0].weight = tied[1].weight
    left = quantize.summary(quantize_dynamic(tied)).left
    assert "slower" in left["1"] and "shares its weight with 1" in left["0"]


@pytest.mark.slow
def test_rows_come_from_calibration(monkeypatch: pytest.MonkeyPatch):
    """A layer is timed at the fewest, the middle and the most rows that calibration gives it."""
    shapes = timings(monkeypatch)
    model = nn.Sequential(linear(4, 4), linear(4, 9000)).eval()
    quantize_dynamic(model, calibration=[randn(n, 2, 4) for n in (1, 2, 3, 9, 5)])
    assert shapes[:3] == [(2, 4), (6, 4), (18, 4)]


def test_a_model_that_int8_slows_down_everywhere(monkeypatch: pytest.MonkeyPatch):
    """It comes back as a float copy, with a warning and a summary that say so."""
    timings(monkeypatch)
    model, x = mlp(24, 40, 8), randn(5, 24)
    with pytest.warns(UserWarning, match=r"no layer of Sequential is faster in int8 .*'size'"):
        same = quantize_dynamic(model)
    assert same is not model and torch.equal(same(x), model(x))
    (step,) = quantize.summary(same).steps
    assert not step.done and set(step.left) == {"0", "2"}
    with pytest.raises(ValueError, match="prefer must be"):
        quantize_dynamic(model, prefer="fast")


def test_a_model_that_int8_slows_down_as_a_whole(monkeypatch: pytest.MonkeyPatch):
    """With calibration it is timed on the smallest batch and the largest; where it loses after a
    second look, it comes back in float, with both times.
    """
    timings(monkeypatch)
    model = nn.Sequential(linear(4, 512), linear(512, 512)).train()
    batches = [randn(count, 4) for count in (3, 2, 9)]
    options = races(monkeypatch, [0.1, 0.05], [0.1, 0.09], [0.1, 0.11])
    with pytest.warns(UserWarning, match=r"Sequential as a whole is slower in int8 .*'size'"):
        same = quantize_dynamic(model, calibration=batches)
    assert torch.equal(same(batches[0]), model(batches[0])) and model.training
    (step,) = quantize.summary(same).steps
    assert not step.done and "110 ms against 100 for a batch of 36" in step.left["1"]
    assert options[:2] == [{"least": 1}, {"least": 1}] and options[2]["seconds"] == 0.3
    races(monkeypatch, [0.1, 0.05], [0.1, 0.11], [0.1, 0.09])
    small = quantize_dynamic(model, calibration=batches)
    assert quantize.summary(small).done


def test_convolutions_and_tables_are_stored_where_int8_slows_down_the_whole(
    monkeypatch: pytest.MonkeyPatch,
):
    """Convolutions compute in float, linear layers are as they were; a warning and the summary say
    so. It is timed again; where it still loses, the result is a float copy.
    """
    timings(monkeypatch)

    class Tagger(nn.Sequential):
        """Reads ids."""

    layers = nn.Embedding(512, 256), Turned(), nn.Conv1d(256, 512, 3), nn.Flatten()
    model = Tagger(*layers, linear(512 * 6, 64)).eval()
    batches = [torch.arange(8).view(1, 8) + 9 * i for i in range(3)]
    lost, won = [0.1, 0.11], [0.1, 0.1]
    races(monkeypatch, lost, lost, won, won)
    with pytest.warns(UserWarning, match="Tagger as a whole is slower in int8 .* stored in int8"):
        small = quantize_dynamic(model, calibration=batches, max_error=0.1)
    (step,) = quantize.summary(small).steps
    assert step.done.keys() == {"0", "2"} and "110 ms against 100" in step.left["4"]
    assert step.done["2"].startswith("stored in int8, computes in float: Tagger as a whole")
    assert 0 < step.distance < 0.02
    assert torch.equal(small[4].weight, model[4].weight) and small[0].packed.dtype is torch.int8
    races(monkeypatch, lost, lost, lost, lost)
    with pytest.warns(UserWarning, match="float copy"):
        same = quantize_dynamic(model, calibration=batches)
    assert torch.equal(same(batches[0]), model(batches[0]))


class Turned(nn.Module):
    """From channels last to channels first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


@dataclass
class Rows:
    """An input of a model that takes one object."""

    values: torch.Tensor


class OfRows(nn.Sequential):
    """A model of such inputs."""

    def forward(self, rows: Rows) -> torch.Tensor:
        return super().forward(rows.values)


def test_numbers_in_dataclasses_count(monkeypatch: pytest.MonkeyPatch):
    """The smallest and the largest batch are known for inputs of the model's own classes too."""
    model = OfRows(linear(4, 4))
    batches = [(Rows(randn(count, 4)),) for count in (3, 2, 9)]
    races(monkeypatch, [0.1, 0.05], [0.1, 0.11], [0.1, 0.11])
    assert "for a batch of 36 numbers" in (speed.slower_as_a_whole(model, model, batches) or "")


def test_the_output_stays_within_an_error():
    """The layers that cost most go back to float, and no more of them than it takes."""
    model, x = nn.Sequential(*(linear(24, 24, seed=i) for i in range(4))).eval(), randn(64, 24)
    with torch.no_grad():
        model[2].weight[:, 3] *= 300  # the other inputs of this layer lose their bits
        model[1].weight[3] /= 300
    given = {"calibration": [x]}
    whole = quantize.summary(in_int8(model, **given))
    limit = 0.7 * whole.distance
    small = in_int8(model, max_error=limit, **given)
    (step,) = quantize.summary(small).steps
    assert step.settings["max_error"] == limit
    assert 0 < step.distance <= limit
    assert step.done and step.left
    reason = next(iter(step.left.values()))
    assert re.match(r"in int8 it alone changes the output by 0\.\d+; max_error is 0\.", reason)
    error = quantize.calibration.distance(small, model, [x])
    assert error == pytest.approx(step.distance, rel=1e-4)
    kept = quantize.summary(in_int8(model, max_error=2 * whole.distance, **given))
    assert len(kept.done) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_error": 0.1}, "max_error=0.1 needs calibration"),
        ({"max_error": 0, "calibration": [randn(2, 24)]}, r"max_error is 0; allowed: \(0, inf\)"),
        (
            {"max_error": float("nan"), "calibration": [randn(2, 24)]},
            r"max_error is nan; allowed: \(0, inf\)",
        ),
        ({"max_error": 1e-7, "calibration": [randn(2, 24)]}, "the layer that costs least, '.'"),
    ],
)
def test_errors_that_cannot_be_kept_are_refused(options: dict, message: str):
    """By name, with the numbers."""
    with pytest.raises(ValueError, match=message):
        in_int8(mlp(24, 40, 8), **options)


def test_what_is_not_a_linear_layer_is_reported():
    """Layers that have no form in int8 are named in the summary, not passed over in silence."""
    layers = {"conv": nn.ConvTranspose2d(1, 4, 3), "rnn": nn.RNN(4, 4), "head": linear(4, 4)}
    (step,) = quantize.summary(in_int8(nn.ModuleDict(layers))).steps
    assert step.done.keys() == {"conv", "head"} and step.done["head"] == "int8"
    assert "computes in float" in step.done["conv"] and "RNN" in step.left["rnn"]


class Overflow(nn.Module):
    """Makes infinities."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1e30 * 1e30


@pytest.mark.parametrize("place", ["input", "inside"])
def test_calibration_that_is_not_finite_is_refused(place: str):
    """NaN in a batch, or made inside the model, names the layer that gets it."""
    model = mlp(24, 40, 8)
    batch = randn(4, 24)
    if place == "input":
        batch[1, 3] = float("nan")
    else:
        model.insert(1, Overflow())
    with pytest.raises(
        ValueError, match=f"layer '{'0' if place == 'input' else '3'}' inputs that are not finite"
    ):
        in_int8(model, calibration=[batch])


def test_what_stays_float_is_said_with_its_size():
    """A network of other layers is refused with its bytes; a model whose table is most of the file
    warns and says the share.
    """
    with pytest.raises(ValueError, match=r"448 of its 448 bytes stay float \(0: a RNN"):
        in_int8(nn.Sequential(nn.RNN(4, 8)))
    model = nn.Sequential(nn.Embedding(100, 24), linear(24, 24, bias=False))
    with pytest.warns(
        UserWarning, match=r"int8: 93% of 10272 bytes stay in floating point \(0: an embedding"
    ):
        small = in_int8(model)
    noted = quantize.summary(small)
    assert noted.steps[-1].settings["stays_float"] == "93% of 10272 bytes"
    assert "93% of the bytes" in noted.left["0"]
