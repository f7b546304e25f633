"""What a forward pass may change is as before after `calibration.untouched`."""

import copy
import dataclasses
import random
from collections import deque

import numpy as np
import pytest
import torch
from contract.odd_state import AddsHook
from helpers import zoo
from torch import nn

from quantize import calibration
from quantize.calibration import main_output, without_cache


class Memory:
    def __init__(self) -> None:
        self.steps, self.seen = 0, []


class Stateful(nn.Module):
    """Changes everything a forward can change."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("assigned", torch.zeros(3))
        self.register_buffer("in_place", torch.zeros(3), persistent=False)
        self.table = nn.Embedding(4, 3, max_norm=0.1)
        self.plain, self.count, self.memory = torch.zeros(3), 0, Memory()
        self.history, self.recent, self.by_name = [torch.zeros(3)], deque([1], maxlen=2), {"x": [0]}
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.assigned = self.assigned + x
        self.in_place.add_(x)
        self.plain.mul_(2).add_(1)
        self.count += 1
        self.memory.steps += 1
        self.memory.seen.append(x)
        self.history.append(x)
        self.history[0].add_(1)
        self.recent.append(2)
        self.by_name["x"].append(1)
        self.by_name["y"] = x
        self.new = x
        noise = (
            torch.rand(3)
            + random.random()
            + np.random.rand()
            + torch.rand(3, generator=self.generator)
        )
        x.add_(1)
        return (
            self.table(torch.arange(4)).sum()
            + self.assigned
            + self.in_place
            + self.plain
            + self.count
            + noise
        )


def test_forward_leaves_no_trace():
    """After the context, the next output is the one that an untouched copy gives, and every
    attribute is as before.
    """
    model, x = Stateful(), torch.randn(3)
    twin, before = copy.deepcopy(model), x.clone()
    buffers = dict(model.named_buffers())
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]
    with calibration.untouched(model):
        for _ in range(3):
            calibration.call(model, x)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    assert np.random.get_state()[2] == state[2]
    assert (
        not hasattr(model, "new")
        and model.count == 0
        and model.memory.steps == 0
        and not model.memory.seen
    )
    assert len(model.history) == 1 and list(model.recent) == [1] and model.by_name == {"x": [0]}
    assert all(buffers[name] is buffer for name, buffer in model.named_buffers())
    assert torch.equal(model.table.weight, twin.table.weight)
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    expected = twin(x.clone())
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    assert torch.equal(model(x.clone()), expected)


def test_what_a_technique_writes_inside_stays():
    """Replaced modules and written parameters are no state of a forward pass."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with calibration.untouched(model):
        model[1] = nn.Tanh()
        with torch.no_grad():
            model[0].weight.fill_(3.0)
    assert isinstance(model[1], nn.Tanh) and model[0].weight[0, 0] == 3


def test_hooks_that_a_forward_adds_are_gone():
    """A model that hooks a layer at its first call does so once, also if it ran before inside;
    hooks that were there stay.
    """
    model = AddsHook()
    handle = model.up.register_forward_hook(lambda *_: None)
    expected = copy.deepcopy(model)(torch.ones(1, 32))
    with calibration.untouched(model):
        model(torch.ones(1, 32))
    assert not model.mid._forward_hooks and list(model.up._forward_hooks) == [handle.id]
    assert torch.equal(model(torch.ones(1, 32)), expected)


def test_distance_is_relative_and_starts_from_the_present_state():
    """Two models that differ by a factor of 1.1 are 0.1 apart, at every call, and dropout draws
    alike in both.
    """
    first = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Dropout(0.5)).train()
    second = copy.deepcopy(first)
    with torch.no_grad():
        second[0].weight.mul_(1.1)
    batches = [torch.randn(2, 4)]
    assert calibration.distance(second, first, batches) == pytest.approx(0.1, rel=1e-4)
    assert first.training and calibration.distance(Stateful(), Stateful(), [torch.ones(3)]) > 0
    assert calibration.distance(first, first, batches) == 0


def test_distance_refuses_values_that_are_not_finite():
    """NaN where the original is finite is no distance."""
    first = nn.Linear(2, 2)
    second = copy.deepcopy(first)
    nn.init.constant_(second.bias, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        calibration.distance(second, first, [torch.ones(1, 2)])


def test_batches_of_pairs_get_a_hint():
    """A loader of (inputs, labels) doesn't fit a forward of one argument: the error says what to
    write.
    """
    with pytest.raises(TypeError, match=r"\[inputs for inputs, _ in loader\]"):
        calibration.call(nn.Linear(2, 2), [torch.ones(1, 2), torch.ones(1)])


def test_without_cache_switches_it_off_and_back_on():
    """A decoder of transformers returns no keys and values inside, and does so again afterwards."""
    model, inputs = zoo("gpt2")
    model.config.use_cache = True
    with without_cache(model):
        assert model(**inputs).past_key_values is None
    assert model.config.use_cache is True and model(**inputs).past_key_values is not None


def test_main_output_looks_into_dataclasses_and_nested_containers():
    """The first floating tensor counts, wherever it is."""

    @dataclasses.dataclass
    class Output:
        ids: torch.Tensor
        parts: tuple

    wanted = torch.ones(2)
    assert main_output(Output(torch.arange(2), ({"a": wanted}, torch.zeros(1)))) is wanted


def test_statistics_of_a_pass_in_training_mode_are_taken_back():
    """BatchNorm changes its running statistics without counting up their version."""
    norm = nn.BatchNorm1d(3)
    before = copy.deepcopy(norm.state_dict())
    with calibration.untouched(norm):
        norm(5 + torch.randn(8, 3))
    assert all(torch.equal(norm.state_dict()[name], tensor) for name, tensor in before.items())


def test_gradients_leave_no_history_in_buffers():
    """A buffer that a forward with gradients writes into is a plain tensor again, so that the model
    can still be copied.
    """

    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x):
            self.mean.mul_(0.9).add_(self.layer(x).mean(0))
            return x + self.mean

    model = Running()
    with calibration.untouched(model):
        calibration.call(model, torch.ones(2, 3))
    assert (
        model.mean.is_leaf and not model.mean.requires_grad and not copy.deepcopy(model).mean.any()
    )
