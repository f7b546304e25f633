"""Programs that follow each other as one, and those with gates of channels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import in_int8, randn
from image_blocks import Mobile
from torch import Tensor, nn
from torch.nn import functional as F

from quantize.native.conv import LAST
from quantize.nn import int8_kernels as kernels
from quantize.nn import int8_plan
from quantize.nn.floats import averaged
from quantize.nn.int8_chain import Program
from quantize.nn.int8_program import trace
from quantize.nn.int8_region import program_of
from quantize.nn.replay import _regions, plainly


class Net(nn.Module):
    """Blocks in a list, a convolution alone behind padding with nothing, and named results."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mobile(), Mobile(), Mobile()])
        self.last, self.pool = nn.Conv2d(32, 48, 1), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor, *, every: bool = False) -> dict[str, Any]:
        between = []
        for block in self.blocks:
            x = block(x)
            between.append(x)
        x = self.last(F.pad(x, [0, 0, 0, 0]))
        found = {"last": x, "pooled": self.pool(x).flatten(1)}
        return found | {"between": between} if every else found


def _programs_of(model: nn.Module) -> list[list[int]]:
    """Operations of the programs in each recording."""
    tapes = [tape for tape in _regions[model].tapes.values() if tape is not None]
    calls = [[step.call for step in tape.steps] for tape in tapes]
    return [[len(one.ops) for one in own if isinstance(one, Program)] for own in calls]


@torch.no_grad()
def test_programs_that_follow_each_other():
    """They are one where nothing else reads what lies between, with the same bits, and see
    changes of a layer.
    """
    model, x = in_int8(Net().eval(), calibration=[randn(2, 32, 12, 12)]), randn(2, 32, 9, 11)
    with kernels.kernel("reference"):
        expected = model(x, every=True)
    for every, programs in ((False, [[10, 1]]), (True, [[10, 1], [3, 3, 3, 1, 1]])):
        for _ in range(5):
            assert torch.equal(model(x, every=every)["last"], expected["last"])
        assert _programs_of(model) == programs
    found = model(x, every=True)["between"]
    assert all(map(torch.equal, found, expected["between"]))
    model.blocks[1].deep.scale.mul_(2)
    with kernels.kernel("reference"):
        changed = model(x)["last"]
    assert torch.equal(model(x)["last"], changed) and not torch.equal(changed, expected["last"])
    model.blocks[2] = copy.deepcopy(model.blocks[0])
    with kernels.kernel("reference"):
        changed = model(x)["last"]
    assert torch.equal(model(x)["last"], changed)


class Gated(nn.Module):
    """Squeeze and excitation between a depthwise convolution and one of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(32, 48, 1), nn.Conv2d(48, 32, 1)
        self.deep, self.act = nn.Conv2d(48, 48, 3, padding=1, groups=48, bias=False), nn.SiLU()
        self.norm, self.squeeze = nn.BatchNorm2d(48), nn.AdaptiveAvgPool2d(1)
        self.reduce, self.expand = nn.Conv2d(48, 40, 1), nn.Conv2d(40, 48, 1)
        self.act_reduce, self.act_expand = nn.SiLU(), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.deep(self.wide(x))))
        gate = self.reduce(self.squeeze(y))
        gate = self.act_expand(self.expand(self.act_reduce(gate)))
        return self.narrow(torch.mul(y, gate)) + x


class GatedTwice(Gated):
    """Another reader of the product."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.deep(x.repeat(1, 2, 1, 1)[:, :48])
        y = y * self.act_expand(self.squeeze(y))
        return self.narrow(y) + y[:, :32]


@torch.no_grad()
def test_gates_of_channels(level: str, monkeypatch: pytest.MonkeyPatch):
    """A block with squeeze and excitation is one program, with the bits of its layers one after
    the other at every instruction set, for any number of threads and samples.
    """
    model = in_int8(nn.Sequential(Gated(), nn.Flatten()).eval(), calibration=[randn(2, 32, 9, 9)])
    block = model[0]
    for x in (randn(3, 32, 10, 11), randn(3, 32, 10, 11).contiguous(memory_format=LAST[4])):
        expected = plainly(partial(type(block).own_forward, block, x))
        pooled = averaged(x, 1).flatten(1)
        assert torch.allclose(pooled, x.mean((2, 3)), rtol=0, atol=1e-6)
        for threads in (1, 2):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            assert program_of(block, x.shape) is not None
            assert torch.equal(block(x), expected)
            assert torch.equal(block(x[1:2]), expected[1:2])
    double = copy.deepcopy(block).double()
    assert torch.allclose(double(x.double()).float(), expected, rtol=0, atol=1e-3)


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean((2, 3)),
    "kept": lambda x: torch.mean(x, dim=[-1, -2], keepdim=True).flatten(1),
    "pool": lambda x: torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1),
}


class Classifier(nn.Module):
    """Numbers of classes by the mean of an image's pixels. pool: one of POOLS."""

    def __init__(self, pool: str) -> None:
        super().__init__()
        self.pool, self.block = pool, Mobile()
        self.first, self.drop, self.last = nn.Linear(32, 48), nn.Dropout(), nn.Linear(48, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = POOLS[self.pool](self.block(x))
        return self.last(self.drop(F.relu(self.first(x))))


class Named(Classifier):
    """With a result that no program gives."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": super().forward(x)}


@pytest.mark.parametrize("pool", POOLS)
@torch.no_grad()
def test_classifiers_are_one_program(pool: str, level: str, monkeypatch: pytest.MonkeyPatch):
    """Means of pixels and int8 linear layers behind them are a part of it, where the forward can be
    read and where it is recorded; all with the bits of one after the other, within rounding of
    torch's.
    """
    model, named = in_int8(Classifier(pool).eval()), in_int8(Named(pool).eval())
    named.load_state_dict(model.state_dict())
    for x in (randn(3, 32, 9, 11), randn(1, 32, 9, 11).contiguous(memory_format=LAST[4])):
        expected = plainly(partial(type(model).own_forward, model, x))
        with kernels.kernel("reference"):
            assert torch.allclose(model(x), expected, rtol=0, atol=0.02)
        for threads in (1, 2):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            assert len(program_of(model, x.shape).ops) == 6
            assert torch.equal(model(x), expected)
            assert all(torch.equal(named(x)["logits"], expected) for _ in range(4))
        assert torch.equal(model(x[:1]), expected[:1])
    assert _programs_of(named) == [[6]] * len(_regions[named].tapes)
    model.last.packed.zero_()
    assert torch.equal(model(x), model.last.bias.expand(len(x), 40))


class Pooled(nn.Module):
    """Max pooling before, between and behind convolutions."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(20, 40, 3, padding=1), nn.Conv2d(40, 24, 3)
        self.options = options

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(F.max_pool2d(x, 2, 1, 1)).relu()
        x = self.second(F.max_pool2d(x, (3, 2), stride=2, padding=(1, 0)))
        return {"pooled": F.max_pool2d(x, 3, **self.options)}


@pytest.mark.parametrize(
    ("options", "programs"), [({}, [5]), ({"dilation": 2}, [5]), ({"ceil_mode": True}, [4])]
)
@torch.no_grad()
def test_max_pooling_is_a_part_of_a_program(
    options: dict[str, Any], programs: list[int], level: str
):
    """Where it is recorded, with the bits and the order of torch's; not where it rounds up."""
    model = in_int8(Pooled(**options).eval(), calibration=[randn(2, 20, 24, 24)])
    for x in (randn(2, 20, 24, 25), randn(1, 20, 24, 25).contiguous(memory_format=LAST[4])):
        x[0, 0, 3, 4] = -torch.inf
        expected = plainly(partial(type(model).own_forward, model, x))["pooled"]
        for _ in range(4):
            found = model(x)["pooled"]
            assert torch.equal(found, expected)
            assert found.stride() == expected.stride()
    assert _programs_of(model) == [programs] * 2


class Sound(nn.Module):
    """Convolutions of what a transposition gives, alone and one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.alone, self.deep = nn.Conv1d(24, 20, 3, 2, 1), nn.Conv1d(24, 24, 3, groups=24)
        self.first, self.second = nn.Conv1d(24, 40, 3), nn.Conv1d(40, 16, 5)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = x.transpose(1, 2)
        return [self.alone(x).relu(), self.deep(x), self.second(self.first(x).relu())]


@torch.no_grad()
def test_transposed_sound(level: str):
    """It is read in its order, for the bits of a contiguous copy, in torch's order."""
    model, x = in_int8(Sound().eval(), calibration=[randn(2, 30, 24)]), randn(3, 31, 24)
    whole = x.transpose(1, 2).contiguous()
    with kernels.kernel("reference"):
        expected = plainly(partial(model, whole.transpose(1, 2)))
    first = [model.alone(whole).relu(), model.deep(whole), model.second(model.first(whole).relu())]
    for _ in range(4):
        for found, own, other in zip(model(x), first, expected, strict=True):
            assert torch.equal(found, own)
            assert found.stride() == own.stride()
            assert torch.equal(found, other)
    assert _programs_of(model) == [[1, 1, 2]]


def test_gates_that_are_read_twice():
    """The product is no part of a program."""
    model = in_int8(nn.Sequential(GatedTwice()).eval())
    assert trace(model[0]) is None


def deep(channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels)


def lines() -> nn.Module:
    """Depthwise layers with those of pixels on both sides, on one, and between two of them."""
    first = [nn.Conv2d(32, 72, 1), nn.SiLU(), deep(72, 3), nn.ReLU6(), nn.Conv2d(72, 40, 1)]
    second = [nn.Conv2d(40, 48, 1), nn.ReLU(), deep(48, 5, 2), nn.Conv2d(48, 48, 1), deep(48, 3)]
    third = [nn.Conv2d(48, 40, 3), deep(40, 3, 2), nn.Conv2d(40, 32, 1)]
    return nn.Sequential(*first, *second, nn.Conv2d(48, 48, 1), *third)


@pytest.mark.slow
@torch.no_grad()
def test_lines_of_large_images(level: str, monkeypatch: pytest.MonkeyPatch):
    """Depthwise layers run line by line with their neighbours, with the bits of one after the
    other.
    """
    monkeypatch.setattr(int8_plan, "_LARGE_BYTES", 1)
    model = in_int8(nn.Sequential(nn.Sequential(lines(), Mobile()), nn.Flatten()).eval())
    block = model[0]
    for shape in ((3, 32, 17, 12), (2, 32, 12, 19)):
        for format in (torch.contiguous_format, torch.channels_last):
            x = randn(*shape).contiguous(memory_format=format)
            expected = type(block).own_forward(block, x)
            for threads in (1, 2):
                monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
                assert torch.equal(block(x), expected)
    (plan, *_) = program_of(block, x.shape).plans.values()
    assert [step.together for step in plan.steps if step.together > 1] == [3, 3, 2, 3]
