"""Models of every make are recovered, or refused by name."""

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from helpers import in_int8, run, zoo
from recovery_models import data, nearby, net, same, state
from torch import nn
from torch.nn.utils import parametrizations, prune

import quantize
from quantize import distill, recover
from quantize.calibration import call, distance, main_output, watching
from quantize.compression.distillation import soft_kl
from quantize.compression.distillation.batches import Numbered
from quantize.nn.low_rank import LowRankLinear
from quantize.training import TrainingError


class IndexAdd(nn.Module):
    """Adds a product, bf16 under autocast, to a float32 tensor: autocast doesn't allow it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(len(x), 5)
        return out.index_add(0, torch.arange(len(x)), self.net(x))


def test_models_that_autocast_breaks_train_in_float32(monkeypatch):
    """One step is tried; the summary says why bf16 wasn't used, and who asks for it is told."""
    monkeypatch.setattr("quantize.training.loop.native_bf16", lambda device: True)
    teacher = IndexAdd().eval()
    result = recover(nearby(teacher), teacher, data(), steps=10)
    settings = quantize.summary(result).steps[0].settings
    assert (
        settings["precision"] == "float32"
        and "a training step of the student fails" in settings["not_bf16"]
    )
    assert distance(result, teacher, data()) < distance(nearby(teacher), teacher, data())
    with pytest.raises(ValueError, match="bf16=True: a training step of the student fails"):
        recover(nearby(teacher), teacher, data(), steps=1, bf16=True)
    plain = recover(nearby(net()), net(), data(), steps=1)
    assert quantize.summary(plain).steps[0].settings["precision"] == "bf16"


class Bag(nn.Module):
    """Sparse gradients, and lengths that renormalize the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 8, sparse=True, max_norm=1.0), nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids).mean(1))


@dataclasses.dataclass
class Output:
    ids: torch.Tensor
    inner: tuple


class Nested(nn.Module):
    """A dataclass whose first tensor is of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor) -> Output:
        return Output(torch.zeros(1, dtype=torch.int64), ({"scores": self.net(x)}, None))


def normed(how: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), how(nn.Linear(16, 5)))


def frozen() -> nn.Module:
    model = net()
    model[0].requires_grad_(False)
    return model


def output(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The main output in eval mode."""
    with watching((), model), torch.no_grad():
        return main_output(call(model, inputs)).clone()


ODD = {
    "sparse and renormalized": (
        Bag,
        [torch.randint(20, (16, 4), generator=torch.Generator().manual_seed(i)) for i in range(8)],
    ),
    "dataclass": (Nested, data()),
    "batches of one": (lambda: nn.Sequential(net(), nn.BatchNorm1d(5)).eval(), data(8, rows=1)),
    "a last batch of one": (
        lambda: nn.Sequential(net(), nn.BatchNorm1d(5)).eval(),
        [*data(7), torch.randn(1, 8)],
    ),
    "batches of all sizes": (net, [torch.randn(n, 8) for n in (3, 9, 1, 17, 2, 5)]),
    "frozen": (frozen, data()),
    "weight_norm": (lambda: normed(nn.utils.weight_norm), data()),
    "spectral_norm": (lambda: normed(nn.utils.spectral_norm), data()),
    "masked": (lambda: normed(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)), data()),
    "parametrized weight_norm": (lambda: normed(parametrizations.weight_norm), data()),
    "parametrized spectral_norm": (lambda: normed(parametrizations.spectral_norm), data()),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_models_are_recovered(name):
    """Nearer to the teacher or as given; nothing given changes; what comes back can be copied."""
    make, batches = ODD[name]
    teacher = make().eval()
    given = nearby(teacher).train()
    before = state(teacher), state(given)
    result = recover(given, teacher, batches, steps=6)
    assert same(state(teacher), before[0]) and same(state(given), before[1])
    held = [inputs for inputs, _, _ in Numbered(batches, paired=False, steps=6).held]
    before, after = (
        sum(soft_kl(output(m, x), output(teacher, x)).item() for x in held) for m in (given, result)
    )
    assert after <= before
    for parameter, original in zip(result.parameters(), given.parameters(), strict=True):
        assert parameter.grad is None and parameter.requires_grad == original.requires_grad
        assert original.requires_grad or torch.equal(parameter, original)
    weights = {
        name: vars(m)["weight"].clone() for name, m in result.named_modules() if "weight" in vars(m)
    }
    again = copy.deepcopy(result)
    with torch.no_grad():
        assert str(call(again, batches[0])) == str(call(result, batches[0]))
    for name, weight in weights.items():  # computed before each pass, and right before the first
        assert torch.equal(weight, vars(again.get_submodule(name))["weight"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(dtype):
    """Losses, their weights and the maps between widths have the dtypes of what they read."""
    teacher, student, batches = net(), net(1), data()
    hidden = {"hidden": {"0": "2"}}
    expected = distill(student, teacher, batches, steps=3, **hidden)
    torch.set_default_dtype(dtype)
    try:
        result = distill(student, teacher, batches, steps=3, **hidden)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(dict(result.state_dict()), dict(expected.state_dict()))


class Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


def test_inputs_in_named_tuples():
    """Batches keep their types on the way to a device."""
    batches = [(Pair(x, x),) for x in data(2)]
    result = recover(Summing(), Summing(), batches, steps=1)
    assert run(result, batches[0]).shape == (16, 5)


class Summing(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, pair):
        return self.net(pair.a + pair.b)


def test_models_that_cannot_be_taught_are_refused_by_name():
    """Integer answers, nothing to train, a batch of inputs and labels."""

    class Classes(nn.Sequential):
        def forward(self, x):
            return super().forward(x).argmax(-1)

    wide = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    with pytest.raises(TypeError, match=r"a tensor of torch.int64 for the student's output"):
        recover(Classes(*net()), Classes(*net()), data(), steps=1)
    for packed in (in_int8(wide), quantize.quantize_weights(wide, bits=4)):
        with pytest.raises(
            ValueError,
            match=r"module '0' \(Int.Linear\) of the student holds integers, which can't be "
            r"trained",
        ):
            recover(packed, wide, data(), steps=1)
    masked = net()
    # an integer buffer alone is no weight
    masked.register_buffer("mask", torch.ones(2, 2, dtype=torch.uint8))
    recover(masked, net(), data(), steps=1)
    with pytest.raises(TrainingError, match="nothing to train"):
        recover(net().requires_grad_(False), net(), data(), steps=1)
    pairs = [(x, x[:, 0]) for x in data()]
    with pytest.raises(
        ValueError, match=r"give the inputs alone: \[inputs for inputs, _ in loader\]"
    ):
        recover(net(), net(), pairs, steps=1)
    with pytest.raises(ValueError, match="NaN"):
        recover(net(), net(), [torch.full((4, 8), torch.nan)], steps=1)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_models_of_transformers_need_no_setting(name):
    """Decoders and encoder-decoders that keep keys and values are shortened, narrowed and taught as
    they come.
    """
    teacher, example = zoo(name)
    teacher.config.use_cache = True
    student = quantize.make_student(teacher, depth=1, width=0.5, example_inputs=example)
    result = recover(student, teacher, [example], steps=2)
    assert teacher.config.use_cache and student.config.use_cache and result.config.use_cache
    assert quantize.summary(result).steps[-1].technique == "recover"


class Spectral(nn.Module):
    """Mixes frequencies by a complex matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.mix = net(), nn.Parameter(torch.eye(3, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft(torch.fft.rfft(self.net(x)) @ self.mix, n=5)


def test_complex_parameters_are_trained():
    """Beside real ones, in both parts."""
    teacher = Spectral().eval()
    with torch.no_grad():
        teacher.mix.mul_(1 + 0.5j)
    student = nearby(Spectral().eval())
    before = student.mix.detach().clone()
    result = recover(student, teacher, data(), steps=10)
    assert distance(result, teacher, data()) < distance(student, teacher, data())
    change = result.mix - before
    assert change.real.abs().max() > 0 and change.imag.abs().max() > 0


def test_a_frozen_pair_of_low_rank_is_no_obstacle():
    """It holds floating numbers that happen not to be trained; the others are."""
    teacher = net()
    student = quantize.factorize_low_rank(teacher, rank=2)
    pair = next(module for module in student if isinstance(module, LowRankLinear))
    frozen = pair.requires_grad_(False).first.weight.clone()
    result = recover(student, teacher, data(), steps=10)
    assert distance(result, teacher, data()) < distance(student, teacher, data())
    assert any(torch.equal(p, frozen) for p in result.parameters())
