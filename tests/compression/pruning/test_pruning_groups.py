"""Structured pruning: what goes together, what stays and is named, what follows the cut."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, run
from pruning_models import Branches, X, mlp, randn, seeded, small, state, untouched
from torch import nn

import quantize
from quantize.compression.pruning import prune_ln_structured


def test_groups():
    """Tied layers shrink together: the residual stream with its norms, gates with their pairs,
    heads with their queries.
    """
    model, inputs = small("residual")
    notes = quantize.summary(prune_ln_structured(model, inputs))
    assert notes.done == {"stem": "16 -> 8 channels", "conv": "16 -> 8 channels"}
    model, inputs = small("decoder")
    pruned = prune_ln_structured(model, inputs)
    block = pruned.blocks[0]
    assert (
        block.attention.q.out_features,
        block.attention.k.out_features,
        block.attention.out.in_features,
    ) == (16, 8, 16)
    assert block.ffn.gate.out_features == block.ffn.up.out_features == block.ffn.down.in_features
    assert "averages over the channels" in quantize.summary(pruned).left["embedding"]
    model, inputs = small("depthwise")
    pruned = prune_ln_structured(model, inputs)
    assert (pruned.depth.groups, pruned.depth.in_channels, pruned.depth.out_channels) == (8, 8, 16)
    assert (pruned.grouped.groups, pruned.grouped.in_channels) == (4, 16)


def test_attributes_follow():
    """An attribute that counts heads is changed where the code needs it."""
    model, inputs = small("attention")
    pruned = prune_ln_structured(model, inputs)
    assert (pruned.num_heads, pruned.head_dim, pruned.qkv.out_features) == (2, 8, 48)


def test_written_size_is_left():
    """Where a size stands in the code, the group stays and the summary says so; asked for by name,
    it raises.
    """
    model, inputs = small("written_size")
    pruned = prune_ln_structured(model, inputs)
    assert pruned.first.out_features == 32 and pruned.second.out_features == 8
    assert "size written in" in quantize.summary(pruned).left["first"]
    with pytest.raises(ValueError, match=r"first.*size written in"):
        prune_ln_structured(model, inputs, amount={"first": 0.5})


def test_amounts():
    """0 changes nothing; a dict prunes what it names, by name or glob; skip leaves a layer's
    outputs whole.
    """
    model, x = mlp(), randn(4, 8)
    assert torch.equal(prune_ln_structured(model, x, amount=0.0)(x), model(x))
    widths = lambda m: (m[0].out_features, m[2].out_features)  # noqa: E731
    assert widths(prune_ln_structured(model, x, amount={"0": 0.25, "2": 0.5})) == (24, 12)
    assert widths(prune_ln_structured(model, x, amount={"[02]": 0.75})) == (8, 6)
    assert widths(prune_ln_structured(model, x, skip=["0"])) == (32, 12)
    assert widths(prune_ln_structured(model, x, amount=0.999)) == (4, 2)
    assert widths(prune_ln_structured(model, x, amount=0.4, round_to=16)) == (16, 16)


def test_flags_and_type_stay():
    """The input keeps its training flags and gradients flags; the result is in eval mode with the
    same classes.
    """
    model, inputs = small("residual")
    model.train()
    model.stem.weight.requires_grad_(False)
    before = state(model)
    pruned = prune_ln_structured(model, inputs, calibration=[inputs])
    assert untouched(model, before) and model.training and not pruned.training
    assert [type(m) for m in pruned.modules()] == [type(m) for m in model.modules()]
    assert not pruned.stem.weight.requires_grad and pruned.conv.weight.requires_grad
    pruned.train()(inputs).sum().backward()


class FixedFilter(nn.Module):
    """A product with a buffer in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(48, 3)
        self.register_buffer("fixed", torch.randn(48, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.linear(self.first(x).relu(), self.fixed).relu())


def test_weights_kept_in_buffers_are_cut_too():
    """A fixed filter is pruned as the weight that it is."""
    model = seeded(FixedFilter)
    pruned, masked = (prune_ln_structured(model, X, masked=full) for full in (False, True))
    assert pruned.fixed.shape == (24, 16) and not pruned.fixed.requires_grad
    assert_close(pruned(X), masked(X))


def test_integer_buffers_are_no_weights():
    """A mask that is kept as bytes doesn't make a model one that was quantized."""
    model, x = mlp(), torch.randn(2, 8)
    model.register_buffer("mask", torch.ones(8, 8, dtype=torch.uint8))
    plain, masked = (quantize.prune_ln_structured(m, x, amount=0.5) for m in (mlp(), model))
    assert torch.equal(masked(x), plain(x))


@dataclasses.dataclass
class Answer:
    y: torch.Tensor
    parts: tuple[torch.Tensor, ...]


class Odd(Branches):
    """Counts its calls, keeps a running mean and an activation, works in place on its input, draws
    random numbers, has an alias, reads a layer's weight itself, and has a layer that runs only when
    asked. Returns a dataclass.
    """

    def build(self):
        self.block = nn.Sequential(nn.Linear(8, 32), nn.ReLU(inplace=True), nn.Linear(32, 24))
        self.alias, self.read, self.last, self.idle = (
            self.block,
            nn.Linear(24, 32),
            nn.Linear(32, 4),
            nn.Linear(4, 4),
        )
        self.calls, self.history = 0, []
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, *, x, idle=False):
        self.calls += 1
        self.history.append(self.calls)
        self.mean.mul_(0.9).add_(x.mean(0) + torch.rand(8) * 0.1)
        x.sub_(self.mean)
        self.kept = F.linear(self.alias(x).relu(), self.read.weight, self.read.bias)
        y = self.last(self.kept) * self.calls
        return Answer(self.idle(y) if idle else y, (y.sum(),))


@pytest.mark.parametrize("calibrated", [False, True])
def test_state_stays(calibrated):
    """A model whose forward changes its state, its inputs and the random state stays as it is; the
    result starts there.
    """
    model, batch = Odd().eval(), {"x": randn(16, 8)}
    model(x=batch["x"].clone()).y.sum().backward()
    before, batch_before, random = state(model), batch["x"].clone(), torch.get_rng_state()
    options = {"calibration": [batch, batch]} if calibrated else {}
    pruned = prune_ln_structured(model, batch, **options)
    masked = prune_ln_structured(model, batch, **options, masked=True)
    assert untouched(model, before) and torch.equal(batch["x"], batch_before)
    assert torch.equal(torch.get_rng_state(), random)
    for result in (pruned, masked):
        assert (result.calls, result.history) == (model.calls, model.history) == (1, [1])
        assert torch.equal(result.mean, model.mean)
    assert set(quantize.summary(pruned).done) == {"block.0", "block.2", "read"}
    for seed in range(3):  # several calls, one after the other
        torch.manual_seed(seed)
        expected = masked(x=batch["x"].clone()).y
        torch.manual_seed(seed)
        assert_close(pruned(x=batch["x"].clone()).y, expected, factor=10)


PARAMETRIZED = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "mask": lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    "parametrization": nn.utils.parametrizations.weight_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_layers_whose_weight_is_computed_are_left(kind, stepped):
    """Under a parametrization, old or new, a layer stays, by name, with what it reads; other layers
    are pruned.
    """
    model = mlp()
    model[0] = PARAMETRIZED[kind](model[0])
    if stepped:
        model(X).sum().backward()
    pruned = prune_ln_structured(model, X, calibration=[X])
    notes = quantize.summary(pruned)
    assert set(notes.done) == {"2"} and "weight is computed" in notes.left["0"]
    assert_close(
        run(pruned, X),
        run(prune_ln_structured(model, X, calibration=[X], masked=True), X),
        factor=10,
    )


def test_progress_names_layers():
    """Calibrated pruning says what it does, layer by layer."""
    lines = []
    prune_ln_structured(mlp(), X, calibration=[X], progress=lines.append)
    assert any("inputs of 2, 4" in line for line in lines) and any(
        "repairing 2" in line for line in lines
    )


def test_notes():
    """Every layer with channels is in the notes, as pruned or left, with the distance of the
    result's outputs.
    """
    model, inputs = small("written_size")
    pruned = prune_ln_structured(model, inputs)
    (step,) = quantize.summary(pruned).steps
    assert step.technique == "pruned" and step.done == {"second": "16 -> 8 channels"}
    assert set(step.left) == {"first", "third"}
    distance = (run(pruned, inputs) - run(model, inputs)).norm() / run(model, inputs).norm()
    assert step.distance == pytest.approx(distance.item(), rel=1e-5)
