"""What `recover` and `distill` promise of any model: never worse than given, and no trace but what
was learned.
"""

import copy

import pytest
import torch
from helpers import assert_close, run
from recovery_models import data, nearby, net, same, state
from torch import nn

import quantize
from quantize import distill, recover
from quantize.calibration import distance
from quantize.compression.distillation.batches import Numbered
from quantize.training import TrainConfig

WILD = TrainConfig(steps=8, lr=3.0, muon_lr=1.0, warmup=0, cooldown=0)


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


def test_a_teacher_is_asked_once_about_what_is_held_out():
    """Its answers are kept while training is judged by them; the summary's distance asks again."""
    teacher, batches = net(), data(8)
    ((held, _, _),) = Numbered(batches, paired=False, steps=16).held
    asked: list[torch.Tensor] = []
    teacher.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].clone()))
    recover(nearby(net(), 0.02), teacher, batches, steps=16)
    assert sum(torch.equal(inputs, held) for inputs in asked) == 2


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
