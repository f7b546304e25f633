"""What `recover` and `distill` promise of any model: never worse than given, and no trace but what
was learned.
"""

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from helpers import assert_close, run, zoo
from torch import nn
from torch.nn.utils import parametrizations, prune

import quantize
from quantize import distill, recover, surgery
from quantize.calibration import call, distance, main_output, watching
from quantize.compression.distillation import soft_kl
from quantize.compression.distillation.batches import Numbered
from quantize.training import TrainConfig, TrainingError

WILD = TrainConfig(steps=8, lr=3.0, muon_lr=1.0, warmup=0, cooldown=0)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)
    ).eval()


def data(count: int = 8, rows: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 8, generator=generator) for _ in range(count)]


def nearby(model: nn.Module, by: float = 0.3) -> nn.Module:
    """A copy with noise on its trainable parameters."""
    other, generator = surgery.clone(model), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += by * parameter.std(correction=0) * noise * parameter.requires_grad
    return other


def state(model: nn.Module) -> dict[str, object]:
    """All of a model that could change, as values."""
    plain = {
        f"{n}.{k}": repr(v)
        for n, m in model.named_modules()
        for k, v in vars(m).items()
        if not k.startswith("_")
    }
    return plain | {
        name: tensor.detach().clone()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }


def same(a: dict[str, object], b: dict[str, object]) -> bool:
    equal = [torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a]
    return a.keys() == b.keys() and all(equal)


# ------------------------------------------------------------------------------------------- never
# worse


@pytest.mark.parametrize(
    "batches", ["many", "one", "two of few rows", "function", "function that ends"]
)
def test_training_that_leads_astray_gives_back_the_best_state(batches):
    """At rates a thousand times too high, what comes back is no worse on the batches it is judged
    by, and says so.
    """
    teacher, given = net(), nearby(net(), 0.02)
    kinds = {
        "many": data(),
        "one": data(1),
        "two of few rows": data(2, rows=4),
        "function": lambda step: data()[step % 8],
    }
    kinds["function that ends"] = data(8).__getitem__
    result = recover(given, teacher, kinds[batches], steps=8, recipe=WILD)
    held = [inputs for inputs, _, _ in Numbered(kinds[batches], paired=False, steps=8).held]
    assert distance(result, teacher, held) <= distance(given, teacher, held) + 1e-6
    (step,) = quantize.summary(result).steps
    assert step.technique == "recover" and step.settings["worth"] < 8
    assert "rates fell" in step.done[""] and "worth it" in step.done[""]


def test_no_step_worth_it_gives_the_same_bits_back():
    """A student that is its teacher stays what it is, and the summary says that no step was worth
    it.
    """
    teacher = net()
    result = recover(copy.deepcopy(teacher), teacher, data(), steps=5, recipe=WILD)
    assert same(dict(result.state_dict()), dict(teacher.state_dict()))
    assert "no step of 5 was worth it" in str(quantize.summary(result))


@pytest.mark.parametrize("kind", ["logits", "values"])
def test_students_that_answer_like_their_teacher(kind):
    """A lossless compression is recovered without an error: no distance rounds below zero."""
    for seed in range(6):
        teacher, batches = net(seed), data(2, rows=4)
        result = recover(
            quantize.factorize_low_rank(teacher, ratio=1.0), teacher, batches, steps=2, kind=kind
        )
        assert_close(run(result, batches[0]), run(teacher, batches[0]), factor=100)


def test_held_out_batches_are_never_trained_on():
    """Whole batches, rows of one, or later steps of a function; every other batch is seen."""
    sequence = Numbered(data(16), paired=False, steps=100)
    seen, held = (
        {sequence(step)[2] for step in range(100)},
        {index for _, _, index in sequence.held},
    )
    assert len(held) == 2 and seen == set(range(16)) - held
    one = Numbered(data(1, rows=32), paired=False, steps=3)
    assert (
        torch.equal(torch.cat([one(0)[0], one.held[0][0]]), data(1, rows=32)[0])
        and len(one.held[0][0]) == 8
    )
    function = Numbered(lambda step: torch.tensor([step]), paired=False, steps=100)
    assert [int(inputs) for inputs, _, _ in function.held] == [100, 101, 102, 103]
    loader = Numbered(
        torch.utils.data.DataLoader(torch.arange(40), batch_size=4), paired=False, steps=9
    )
    assert {int(loader(step)[0][0]) for step in range(9)}.isdisjoint(
        int(inputs[0]) for inputs, _, _ in loader.held
    )


# -----------------------------------------------------------------------------------------------
# state


class Stateful(nn.Module):
    """A forward that counts, keeps a hidden state with its graph, and normalizes."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.norm, self.drop = net(), nn.BatchNorm1d(5), nn.Dropout(0.2)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("hidden", torch.zeros(5))
        self.count, self.kept = 0, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.count += 1
        y = self.drop(self.norm(self.net(x))) + self.hidden
        self.hidden = y.mean(0)
        self.kept = y
        return y


@pytest.mark.parametrize("how", [recover, distill])
def test_stateful_models_start_from_their_own_state(how):
    """Both models are as before to the last counter; the result has the student's state, learned
    statistics apart.
    """
    teacher, given = Stateful().eval(), nearby(Stateful()).train()
    with torch.no_grad():
        given.norm.running_var.mul_(1.5)
    before = state(teacher), state(given)
    result = how(given, teacher, data(), steps=20)
    assert same(state(teacher), before[0]) and same(state(given), before[1])
    assert (
        result.count == 0
        and result.kept is None
        and not result.calls.any()
        and not result.hidden.any()
    )
    assert not torch.equal(result.norm.running_var, given.norm.running_var)
    copied = copy.deepcopy(result)
    for x in data(3):
        assert torch.equal(run(copied, x), run(result, x))


def test_resumed_run_has_the_bits_of_a_whole_one_also_after_it_went_astray(tmp_path):
    """What training was judged by is in the state file: losses, best tensors, fallen rates."""
    teacher, given, options = net(), nearby(net(), 0.02), {"steps": 8, "recipe": WILD}
    whole = recover(given, teacher, data(), **options)

    def stop(at) -> None:
        if at.step == 6:
            raise KeyboardInterrupt

    file = {"checkpoint_path": tmp_path / "state", "checkpoint_seconds": 0.0}
    with pytest.raises(KeyboardInterrupt):
        recover(given, teacher, data(), **options, **file, on_progress=stop)
    resumed = recover(given, teacher, data(), **options, **file, resume=True)
    assert same(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert quantize.summary(resumed).steps == quantize.summary(whole).steps


# ------------------------------------------------------------------------------------------ odd
# models


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
    for packed in (quantize.quantize_dynamic(wide), quantize.quantize_weights(wide, bits=4)):
        with pytest.raises(
            ValueError,
            match=r"module '0' \(Int.Linear\) of the student holds integers, which can't be "
            r"trained",
        ):
            recover(packed, wide, data(), steps=1)
    masked = net()
    masked.register_buffer(
        "mask", torch.ones(2, 2, dtype=torch.uint8)
    )  # an integer buffer alone is no weight
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
