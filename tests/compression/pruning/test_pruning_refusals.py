"""Structured pruning: bad arguments and models are refused by name."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import in_int8
from pruning_models import X, mlp, randn, seeded, state, untouched
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from quantize.compression.pruning import prune_ln_structured


class Dynamic(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x):
        return self.b(self.a(x)) if x.sum() > 0 else self.b(self.a(-x))


class SplitByData(nn.Module):
    """Two experts; how many rows each gets is known when the model runs."""

    def __init__(self):
        super().__init__()
        self.mlp = mlp()
        self.experts = nn.ModuleList([nn.Linear(3, 5), nn.Linear(3, 5)])

    def forward(self, x):
        x = self.mlp(x)
        second = x[:, 0] > 0
        order = second.int().argsort()
        rows = second.sum().item()
        parts = x[order].split([len(x) - rows, rows])
        given = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
        return torch.cat(given)[order.argsort()]


BAD = {
    "amount 1": ({"amount": 1.0}, ValueError, r"amount is 1.0; allowed: \[0, 1\)"),
    "amount negative": ({"amount": -0.1}, ValueError, "amount is -0.1"),
    "amount nan": ({"amount": math.nan}, ValueError, "amount is nan"),
    "amount text": ({"amount": "half"}, TypeError, "half"),
    "amount bool": ({"amount": True}, TypeError, "True"),
    "amount in dict": ({"amount": {"0": 2}}, ValueError, r"amount\['0'\] is 2"),
    "no names": ({"amount": {}}, ValueError, "empty dict"),
    "unknown name": ({"amount": {"layer": 0.5}}, ValueError, "'layer', which is not a module"),
    "no match": ({"amount": {"conv*": 0.5}}, ValueError, "conv"),
    "output layer": ({"amount": {"4": 0.5}}, ValueError, "'4'.*output of the model"),
    "no channels": ({"amount": {"1": 0.5}}, ValueError, "'1'.*no output channels"),
    "n 0": ({"n": 0}, ValueError, "n is 0"),
    "n negative": ({"n": -2}, ValueError, "n is -2"),
    "n nan": ({"n": math.nan}, ValueError, "n is nan"),
    "n text": ({"n": "fro"}, TypeError, "fro"),
    "skip unknown": ({"skip": ["nope"]}, ValueError, "nope"),
    "skip all": ({"skip": [nn.Linear]}, ValueError, "nothing in Sequential can be pruned"),
    "empty": ({"calibration": []}, ValueError, "calibration is empty"),
    "iterator": ({"calibration": iter([X])}, TypeError, "re-iterable"),
    "tensor": ({"calibration": X}, TypeError, "sequence of batches"),
    "wrong shape": ({"calibration": [randn(4, 9)]}, ValueError, "calibration"),
    "not finite": ({"calibration": [X * math.nan]}, ValueError, "not finite"),
    "weights not finite": (
        {"amount": {"2": 0.5}, "calibration": [X * 1e38 * 1e38]},
        ValueError,
        "not finite",
    ),
    "round_to": ({"round_to": 0}, ValueError, "round_to is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    """Bad input is refused with an error that names it, and the model stays as it was."""
    options, kind, message = BAD[case]
    model = mlp()
    before = state(model)
    with pytest.raises(kind, match=message):
        prune_ln_structured(model, X, **options)
    assert untouched(model, before)


@pytest.mark.parametrize(
    ("build", "inputs", "kind", "message"),
    [
        (
            lambda: nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 4)),
            X,
            ValueError,
            "'0'.*no shape yet",
        ),
        (mlp, randn(4, 9), ValueError, "doesn't run on example_inputs"),
        (mlp, 3, TypeError, "example_inputs"),
        (Dynamic, X, ValueError, "can't be exported"),
        (
            lambda: nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)),
            X,
            ValueError,
            "nothing in Sequential can be pruned",
        ),
        (
            lambda: nn.Sequential(weight_norm(nn.Linear(8, 8)), nn.Linear(8, 4)),
            X,
            ValueError,
            "nothing in Sequential can be pruned: '0': its weight is computed",
        ),
        (nn.ReLU, X, ValueError, "nothing in ReLU can be pruned"),
        (lambda: "model", X, TypeError, "nn.Module"),
    ],
)
def test_bad_models(build, inputs, kind, message):
    """A model that doesn't run, can't be followed or has nothing to prune is refused by name."""
    with pytest.raises(kind, match=message):
        prune_ln_structured(build(), inputs)


def test_channels_that_are_split_by_the_data_stay():
    """What reaches a split into sizes that depend on the data stays whole, the rest is pruned."""
    pruned = prune_ln_structured(seeded(SplitByData), randn(6, 8), amount=0.5)
    assert [pruned.mlp[0].out_features, pruned.mlp[4].out_features] == [16, 3]
    assert pruned(randn(9, 8)).shape == (9, 5)


def test_int8_is_refused():
    """Pruning comes before int8."""
    with pytest.raises(ValueError, match="prune before quantiz"):
        prune_ln_structured(in_int8(mlp()), X)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("place", ["0.weight", "2.weight", "2.bias"])
def test_weights_that_are_not_finite_name_the_layer(place, value):
    """Channels with infinite weights or NaN are neither scored nor cut."""
    model = mlp()
    model.get_parameter(place).data.view(-1)[3] = value
    with pytest.raises(ValueError, match=f"layer '{place[0]}' has weights that are not finite"):
        prune_ln_structured(model, X)
