"""One policy for all techniques: hooks, tied weights, computed weights, forwards of their own,
weights that are not finite.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import cosine, in_int8, randn, seeded
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import quantize
from quantize.compression.int4 import quantize_weights

TRANSFORMS = {
    "int8": in_int8,
    "int4": quantize_weights,
    "fp16": quantize.to_half,
    "bf16": lambda m: quantize.to_half(m, torch.bfloat16),
}
COMPUTED = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "pruning mask": lambda m: prune.l1_unstructured(m, "weight", 0.5),
}
PARAMETRIZED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
each_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)


def net(change=lambda m: m) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), change(nn.Linear(64, 32))).eval()


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@each_transform
@pytest.mark.parametrize("when", ["fresh", "trained"])
@pytest.mark.parametrize("change", COMPUTED.values(), ids=COMPUTED)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_a_hook_computes(change, when, transform, tmp_path):
    """int8 and int4 read it once, as it is now; half stores what it is computed from. The result
    runs, and so does its file.
    """
    model, x = net(change), randn(5, 64)
    if when == "trained":
        model.train()(x).sum().backward()
        model.eval()
    with torch.no_grad():
        next(p for name, p in model[2].named_parameters() if name != "bias").mul_(0.5)
    small = transform(model)
    with torch.no_grad():
        assert relative(small(x), model(x)) < 0.15
        noted = quantize.summary(small)
        assert "2" in noted.done
        quantize.save(small, tmp_path / "small.pth")
        assert torch.equal(quantize.load(tmp_path / "small.pth", model=net(change))(x), small(x))


@each_transform
@pytest.mark.parametrize("change", PARAMETRIZED.values(), ids=PARAMETRIZED)
def test_a_weight_that_a_parametrization_computes(change, transform):
    """It is read once by int8 and int4, and rounded where it comes from by half; the result is near
    the model.
    """
    model, x = net(change), randn(5, 64)
    small = transform(model)
    with torch.no_grad():
        assert relative(small(x), model(x)) < 0.15
    if transform in (in_int8, quantize_weights):
        assert not hasattr(small[2], "parametrizations") and "2" in quantize.summary(small).done


@each_transform
@pytest.mark.parametrize("training", [True, False])
def test_hooks_and_modes_follow(transform, training):
    """Forward hooks run on the layer that took the other's place, and every module keeps its
    training flag.
    """
    model, seen = net().train(training), []
    model[0].eval()
    model[2].register_forward_hook(lambda m, args, output: output + 1)
    model[2].register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(len(args)), with_kwargs=True
    )
    small, x = transform(model), randn(5, 64)
    with torch.no_grad():
        assert relative(small(x), model(x)) < 0.1
    assert seen == [1, 1]
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]


@pytest.mark.parametrize("transform", [in_int8, quantize_weights])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(transform, value):
    """By the layer's name, also inside an attention."""
    model = net()
    with torch.no_grad():
        model[2].weight[3, 3] = value
    with pytest.raises(ValueError, match="'2' has a weight that is not finite"):
        transform(model)
    attention = nn.ModuleDict({"inner": nn.MultiheadAttention(32, 2)})
    with torch.no_grad():
        attention["inner"].in_proj_weight[40, 3] = value
    with pytest.raises(ValueError, match=r"'inner\.k' has a weight that is not finite"):
        transform(attention)


@pytest.mark.parametrize("transform", [in_int8, quantize_weights])
def test_what_others_hold_or_compute_is_shared_or_left(transform):
    """Linears that share a weight give one answer before and after; a forward of its own keeps its
    layer, by name.
    """
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    model[2].forward = lambda x: x
    x = randn(5, 64)
    if transform is quantize_weights:
        with pytest.raises(
            ValueError, match=r"0: it shares its weight with 1; .*2: its forward was replaced"
        ):
            transform(model)
        return
    small = transform(model)
    assert small[0].packed is small[1].packed and "forward" in quantize.summary(small).left["2"]
    with torch.no_grad():
        assert relative(small(x), model(x)) < 0.03


class AsksForClasses(nn.Module):
    """Its forward decides by the classes of its layers what to do with their outputs."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(32, 64, batch_first=True)
        self.features = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
        self.head = nn.Linear(64, 8)

    def last(self, x: Tensor) -> Tensor:
        state = self.rnn(x)[1]
        return (state[0] if isinstance(self.rnn, nn.LSTM) else state)[-1]

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.last(x)
        return [self.head(x), self.features(x)]


def test_layers_whose_class_is_asked_for_stay():
    """A method that forward calls asks for nn.LSTM; the other layers are converted."""
    model, x = AsksForClasses().eval(), randn(2, 5, 32)
    with torch.no_grad():
        for technique in (in_int8, quantize.factorize_low_rank):
            small = technique(model)
            noted = quantize.summary(small)
            assert type(small.rnn) is nn.LSTM and "head" in {*noted.done, *noted.left}
            assert [t.shape for t in small(x)] == [t.shape for t in model(x)]
    assert "asks whether" in quantize.summary(in_int8(model)).left["rnn"]


class Rescales(nn.Module):
    """Divides the output layers of its blocks by 2 at the first call, as RWKV does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"value": nn.Linear(32, 32), "output": nn.Linear(32, 32)})
            for _ in range(2)
        )
        self.gate = nn.ModuleDict({"output": nn.Linear(32, 32)})
        self.rescaled = False

    def rescale(self) -> None:
        with torch.no_grad():
            for block in self.blocks:
                block.output.weight.data.div_(2)
        self.rescaled = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.rescaled:
            self.rescale()
        for block in self.blocks:
            x = x + block["output"](block["value"](x).relu())
        return self.gate["output"](x)


def test_layers_whose_weight_is_written_stay():
    """A method that forward calls divides weights: those layers are named, and the copy runs."""
    model, x = seeded(Rescales).eval(), randn(5, 32)
    with torch.no_grad():
        for technique in (in_int8, quantize.quantize_weights, quantize.factorize_low_rank):
            small = technique(model)
            assert "writes to its weight" in quantize.summary(small).left["blocks.1.output"]
            assert type(small.blocks[0]["output"]) is nn.Linear
            assert type(small.blocks[0]["value"]) is not nn.Linear
            assert torch.isfinite(small(x)).all()
        assert cosine(in_int8(model)(x), copy.deepcopy(model)(x)) > 0.99
    assert not model.rescaled


def test_weights_that_a_forward_writes_are_as_before():
    """Runs on calibration leave the model's weights, and the copy's, as they were: the copy divides
    them once.
    """
    model, x = seeded(Rescales).eval(), randn(64, 32)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        for small in (
            in_int8(model, calibration=[x]),
            quantize.quantize_weights(model, calibration=[x]),
            quantize.factorize_low_rank(model, ratio=0.9, calibration=[x]),
        ):
            assert all(torch.equal(now, before[name]) for name, now in model.state_dict().items())
            assert (small(x) - expected).norm() < 0.12 * expected.norm()
