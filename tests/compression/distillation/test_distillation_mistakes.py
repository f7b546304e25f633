"""Options, batches and students that don't fit are named."""

import math

import pytest
import torch
import torch.nn.functional as F
from distillation_models import deep, inputs, labelled, net
from helpers import in_int8
from torch import nn

from quantize.compression.distillation import (
    distill,
    make_student,
    recover,
)
from quantize.training import TrainConfig, TrainingError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, r"temperature is 0; allowed: \(0, inf\)"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"alpha": 1.5}, r"alpha is 1.5; allowed: \[0, 1\]"),
        ({"alpha": 0.5}, "give loss"),
        ({"steps": 0}, "steps is 0; allowed: an integer >= 1"),
        ({"hidden": ["nowhere"]}, "hidden names 'nowhere', which is no module of the student"),
        ({"hidden": {"2": "nowhere"}}, "hidden names 'nowhere', which is no module of the teacher"),
        ({"kind": "other"}, "kind is 'other'; allowed"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    """One line that says which argument, its value, and what is allowed."""
    with pytest.raises(ValueError, match=message):
        distill(net(), net(), inputs(), **{"steps": 2, **options})


def test_batches_that_do_not_fit_are_named():
    """Empty, an iterator, inputs that the models don't take, pairs without a loss."""
    with pytest.raises(ValueError, match="batches is empty"):
        distill(net(), net(), [], steps=1)
    with pytest.raises(TypeError, match="batches must be re-iterable"):
        distill(net(), net(), iter(inputs()), steps=1)
    with pytest.raises(ValueError, match=r"the student .* doesn't run on the first batch"):
        distill(net(), net(), [torch.zeros(3, 4)], steps=1)
    with pytest.raises(ValueError, match="the first batch is empty"):
        distill(net(), net(), [torch.zeros(0, 8)], steps=1)
    with pytest.raises(ValueError, match="give loss too"):
        distill(net(), net(), labelled(), steps=1)
    with pytest.raises(TypeError, match="a batch is a pair"):
        distill(net(), net(), inputs(), steps=1, loss=F.cross_entropy)


def test_other_vocabularies_and_untrainable_students_are_refused():
    """Class counts that differ, int8, 16 bits, frozen, and a forward without gradients."""
    with pytest.raises(
        ValueError, match=r"differ in classes \(or vocabulary\): outputs \[16, 5\] and \[16, 6\]"
    ):
        distill(net(), net(classes=6), inputs(), steps=1)
    with pytest.raises(ValueError, match="holds integers, which can't be trained"):
        recover(in_int8(net(64)), net(64), inputs(), steps=1)
    with pytest.raises(ValueError, match=r"parameter '0.weight' of the student is torch.float16"):
        distill(net().half(), net(), inputs(), steps=1)
    with pytest.raises(TrainingError, match="nothing to train"):
        distill(net().requires_grad_(False), net(), inputs(), steps=1)

    class Detached(nn.Sequential):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(TrainingError, match="no gradient reaches the student"):
        distill(Detached(*net()), net(), inputs(), steps=1)


def test_loss_that_is_not_finite_stops_with_the_last_good_student():
    """The error brings the student as it was before the step, running statistics included."""
    student, data = nn.Sequential(net(), nn.BatchNorm1d(5)), inputs(4)
    recipe = TrainConfig(steps=3, warmup=0, cooldown=0)
    good = distill(student, net(), lambda step: data[step % 2], steps=2, recipe=recipe)
    data[2] = torch.full_like(data[2], math.nan)
    with pytest.raises(TrainingError, match=r"step 2: loss nan.*not finite") as caught:
        distill(
            student,
            net(),
            lambda step: data[step % 4] if step < 3 else data[3],
            steps=3,
            recipe=recipe,
        )
    with pytest.raises(
        ValueError, match=r"loss on batch 2 \(held out\) is nan before the first step"
    ):
        distill(student, net(), data, steps=3, recipe=recipe)
    for a, b in zip(
        caught.value.student.state_dict().values(), good.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give depth"),
        ({"depth": 0}, "depth is 0; allowed"),
        ({"depth": 1.5}, "depth is 1.5; allowed"),
        ({"width": 0.0}, "width is 0.0; allowed"),
        ({"depth": 9}, "removes no block of .*has only 4 blocks"),
        (
            {"depth": 2, "example_inputs": torch.zeros(2)},
            "the teacher doesn't run on example_inputs",
        ),
    ],
)
def test_students_that_cannot_be_made_are_named(options, message):
    """Numbers out of range, nothing to remove, inputs that don't run."""
    teacher, example = deep("gpt2")
    with pytest.raises(ValueError, match=message):
        make_student(teacher, **{"example_inputs": example, **options})
