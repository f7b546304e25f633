"""Calibration: which layers and rows are shown, errors, and models left as they were."""

from __future__ import annotations

import warnings

import pytest
import torch
from calibration_models import TwoInputs, gradient_moments
from helpers import assert_close, randn, zoo
from torch import nn

import quantize
from quantize import calibration
from quantize.compression.low_rank import residuals


def test_a_layer_that_never_runs_is_named(model, batches):
    """An unreached layer is an error with its name."""
    with pytest.raises(ValueError, match="never reaches layer 'rare'"):
        calibration.collect(model, batches, {"a": model.a, "rare": model.rare})


def test_inputs_that_are_not_finite_name_the_layer(model):
    """NaN in a layer's input is an error with its name."""
    with pytest.raises(ValueError, match="layer 'a' inputs that are not finite"):
        calibration.collect(model, [torch.full((2, 6), float("nan"))], {"a": model.a})


@pytest.mark.parametrize(
    ("batches", "error"),
    [
        ([], ValueError),
        (iter([torch.ones(1, 6)]), TypeError),
        (torch.ones(1, 6), TypeError),
        (None, TypeError),
        (3, TypeError),
    ],
)
def test_bad_batches_are_refused(model, batches, error):
    """Empty, one-shot and single batches are errors that say what to write."""
    with pytest.raises(error, match="calibration"):
        calibration.collect(model, batches, {"a": model.a})


def test_models_are_left_as_they_were(model, batches):
    """Training flags, hooks and gradients are the same afterwards, also when a batch fails."""
    model.train()
    model.c.eval()
    calibration.collect(model, batches, {"a": model.a})
    gradient_moments(model, batches, {"a": model.a})
    with pytest.raises(RuntimeError):
        calibration.collect(model, [torch.ones(2, 7)], {"a": model.a})
    assert model.training and model.a.training and not model.c.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_what_was_compiled_in_place_is_watched_as_written(model, batches):
    """Hooks run as Python and not inside of what `torch.compile` makes; the compiled call is back
    afterwards.
    """

    def compiled(*_):
        pytest.fail("ran what was compiled")

    expected = calibration.collect(model, batches, {"c": model.c})["c"]
    model._compiled_call_impl = model.c._compiled_call_impl = compiled
    seen = calibration.collect(model, batches, {"c": model.c})["c"]
    assert torch.equal(seen.second_moment, expected.second_moment)
    assert model._compiled_call_impl is model.c._compiled_call_impl is compiled


def test_pairs_match_row_by_row(model, batches):
    """A narrow layer is paired with what the original gave, row by row."""
    torch.manual_seed(2)
    changed = TwoInputs()
    walk = calibration.Walk(model, batches, ["c"])
    seen = residuals.collect(walk, changed, model, ["c"], set())["c"]
    x = torch.cat([torch.relu(changed.a(b) + changed.b(b)).reshape(-1, 5) for b in batches])
    y = torch.cat([model(b).reshape(-1, 3) for b in batches])
    weight, bias = model.c.weight.double(), model.c.bias.double()
    assert seen.is_target
    assert_close(seen.target_moment(weight, centred=False), y.T @ x / len(x))
    assert_close(seen.second_moment, x.T @ x / len(x))
    assert_close(seen.target_mean(weight, bias), y.mean(0))


def test_what_a_wide_layer_is_to_give_follows_from_its_inputs(batches):
    """Of layers with more outputs than inputs the inputs are paired, which cost less, also where
    they share them with a layer beside them.
    """
    torch.manual_seed(3)

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.left, self.right = nn.Linear(6, 5), nn.Linear(5, 9), nn.Linear(5, 9)

        def forward(self, x):
            x = self.before(x)
            return self.left(x) + self.right(x)

    model, changed = Wide().eval(), Wide().eval()
    names = ["left", "right"]
    walk = calibration.Walk(model, batches, names)
    found = residuals.collect(walk, changed, model, names, set())
    x = torch.cat([changed.before(b).reshape(-1, 5) for b in batches])
    r = torch.cat([model.before(b).reshape(-1, 5) for b in batches])
    for name in names:
        layer, seen = getattr(model, name), found[name]
        y, weight = layer(r), layer.weight.double()
        assert not seen.is_target
        assert_close(seen.second_moment, x.T @ x / len(x))
        assert_close(
            seen.target_moment(weight, centred=False) + torch.outer(layer.bias, seen.mean),
            y.T @ x / len(x),
        )
        assert_close(seen.target_mean(weight, layer.bias.double()), y.mean(0))


def test_a_pass_ends_at_the_last_layer(model, batches):
    """Nothing after the layers that are shown runs, and they are shown as in whole passes."""
    both = [(b, True) for b in batches]
    whole = calibration.collect(model, both, {"a": model.a, "b": model.b})
    walk = calibration.Walk(model, both, ["a", "b"])
    late = lambda *_: pytest.fail("ran a layer after the last one watched")  # noqa: E731
    model.rare.register_forward_pre_hook(late)
    ended = residuals.collect(walk, model, model, ["a", "b"], set())
    for name in whole:
        assert_close(ended[name].second_moment, whole[name].second_moment)
        layer = getattr(model, name)
        given = ended[name].target_moment(layer.weight.double(), centred=True)
        expected = layer.weight.double() @ whole[name].covariance
        assert_close(given, expected, dtype=torch.float32)


def test_calls_are_grouped_by_shared_input(model, batches):
    """Layers that run one after another on the same tensor form a group; the rest follow in running
    order.
    """
    calls = calibration.trace_calls(
        model, batches[0], {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    )
    assert calls.groups == [["a", "b"], ["c"]]
    assert calls.shapes == {"a": (3, 4, 6), "b": (3, 4, 6), "c": (3, 4, 5)}


def test_calls_find_q_k_v_in_a_foreign_model():
    """In a Llama, q, k, v share a group, and so do gate and up."""
    model, inputs = zoo("llama")
    layers = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers.0" in n
    }
    groups = [
        [n.rsplit(".", 1)[1] for n in group]
        for group in calibration.trace_calls(model, inputs, layers).groups
    ]
    assert groups == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


@pytest.mark.parametrize("technique", ["pruning", "low rank"])
def test_outputs_that_moved_by_half_are_told(technique):
    """Whoever takes most of a model away hears how far its outputs went, and of a little nothing
    but the summary tells.
    """
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    batches = [randn(256, 16)]

    def cut(much: bool) -> nn.Module:
        if technique == "pruning":
            amount = 0.95 if much else 0.05
            return quantize.prune_ln_structured(
                model, batches[0], amount=amount, calibration=batches, round_to=1
            )
        rank = 1 if much else 12
        return quantize.factorize_low_rank(model, rank=rank, calibration=batches, only_faster=False)

    with pytest.warns(UserWarning, match=rf"{technique}: the outputs of Sequential moved by \d+%"):
        cut(much=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 < quantize.summary(cut(much=False)).steps[0].distance < 0.5
