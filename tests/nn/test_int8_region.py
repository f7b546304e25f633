"""Regions: modules of int8 convolutions that run as one program, with the bits of their forward."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import in_int8, randn
from image_blocks import Mobile
from torch import Tensor, nn
from torch.nn import functional as F

import quantize
from quantize.compression.int8 import speed, whole
from quantize.nn import int8_kernels as kernels
from quantize.nn.int8_conv import Int8Conv
from quantize.nn.int8_program import trace
from quantize.nn.int8_region import Region, program_of
from quantize.nn.timing import Timing


class Block(nn.Module):
    """Three convolutions and a shortcut, as in ResNets; asks for its channels as some models do."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(inputs, 32, 1), nn.Conv2d(32, outputs, 1)
        self.middle, self.norm = nn.Conv2d(32, 32, 3, stride, 1, bias=False), nn.BatchNorm2d(32)
        self.shortcut: nn.Module = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.first.in_channels:
            raise ValueError(f"{x.shape[1]} channels")
        y = F.relu(self.first(x))
        y = torch.relu_(self.norm(self.middle(y)))
        y = self.last(y)
        y += self.shortcut(x)
        return y.relu()


class Padded(Mobile):
    """Pads as models from TensorFlow do: by the size of the input, more behind than before it."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Conv2d(48, 48, 3, 2, groups=48)
        self.around = nn.ZeroPad2d((2, 0, 1, 0))
        self.last = nn.Conv2d(32, 32, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.reaching(F.relu6(self.wide(self.reaching(x, 1, 1))), 3, 2)
        y = self.cut(self.deep(y))
        return self.last(self.around(self.narrow(y)))

    @staticmethod
    def reaching(x: Tensor, kernel: int, stride: int) -> Tensor:
        high, wide = [max(kernel - (int(n) % stride or stride), 0) for n in x.shape[-2:]]
        pads = [wide // 2, wide - wide // 2, high // 2, high - high // 2]
        return F.pad(x, pads, "constant", 0.0)


def stem() -> nn.Module:
    return nn.Sequential(nn.Conv2d(32, 40, 5, 2, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))


def smooth() -> nn.Module:
    """Activations that are more than limits, behind convolutions of each kind."""
    wide, deep = nn.Conv2d(32, 48, 1), nn.Conv2d(48, 48, 3, padding=1, groups=48)
    return nn.Sequential(wide, nn.SiLU(), deep, nn.GELU(), nn.Conv2d(48, 32, 3), nn.GELU("tanh"))


def sound() -> nn.Module:
    return nn.Sequential(nn.Conv1d(32, 40, 5, 2), nn.ReLU(), nn.Conv1d(40, 40, 3, padding=1))


def blocks() -> nn.Module:
    return nn.Sequential(Block(32, 32), Block(32, 48, 2), Block(48, 48))


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "blocks": blocks,
    "mobile": Mobile,
    "padded": Padded,
    "stem": stem,
    "smooth": smooth,
    "sound": sound,
    "depthwise last": lambda: nn.Sequential(nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3, groups=32)),
}


def region(make: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(make(), nn.Flatten()).eval()
    shape = (2, 32, 12) if make is sound else (2, 32, 12, 12)
    model = in_int8(model, calibration=[randn(*shape)])
    assert isinstance(model[0], Region)
    return model[0]


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_the_bits_of_the_forward(name: str):
    """In both orders of channels, for several sizes, with the modules inside and without native
    code.
    """
    module = region(MAKERS[name])
    for shape in ((1, 32, 9, 14), (3, 32, 17, 8)):
        x = randn(*shape) if name != "sound" else randn(*shape[:3])
        images = [x]
        if x.dim() == 4:
            images.append(x.contiguous(memory_format=torch.channels_last))
        for one in images:
            expected = type(module).own_forward(module, one)
            program = program_of(module, one.shape)
            actual = module(one)
            assert program is not None and any(key[0] == one.shape for key in program.plans)
            assert torch.equal(actual, expected) and actual.stride() == expected.stride()
            with kernels.kernel("reference"):
                assert torch.equal(module(one), actual)


@torch.no_grad()
def test_every_instruction_set_and_thread_count(level: str, monkeypatch: pytest.MonkeyPatch):
    """The bits of the forward in stock operations, and those of each sample alone."""
    module, x = region(lambda: nn.Sequential(Block(32, 32, 2), *smooth())), randn(4, 32, 10, 11)
    with kernels.kernel("reference"):
        expected = module(x)
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(module(x), expected) and program_of(module, x.shape)
        assert torch.equal(module(x[2:3]), expected[2:3])


class Pair(nn.Module):
    """Two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


class Adds(Pair):
    """Changes what it was given."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.last(self.first(x))
        return x


class Keeps(Pair):
    """An activation is one of two readers."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y.relu()) + y


class Optional(Pair):
    """Another branch for an argument that is mostly left out."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.last(self.first(x))
        return y.relu() if scale is None else y


class Decides(Pair):
    """Asks for a size that its inputs don't share."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.first(x))
        return y if x.shape[2] > 5 else y.relu()


class Around(Pair):
    """Each pixel has a range of its own: what is padded would have one too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.pad(self.first(x), [1, 1]))


class Ones(Pair):
    """Pads with another number."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(32, 32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.pad(self.first(x), [1, 1], value=1.0))


@pytest.mark.parametrize("kind", [Keeps, Around, Ones])
def test_forwards_that_are_no_program(kind: type[Pair]):
    models = [in_int8(nn.Sequential(one()).eval()) for one in (Pair, kind)]
    assert [trace(model[0]) is None for model in models] == [False, True]


@torch.no_grad()
def test_a_forward_that_asks_for_a_size():
    """It has a program for each shape, as it decides there."""
    module = region(Decides)
    for side, least in ((8, -math.inf), (5, 0.0)):
        x = randn(2, 32, side, 8)
        program = program_of(module, x.shape)
        assert program is not None and program.ops[-1].ending.low == least
        assert torch.equal(module(x), type(module).own_forward(module, x))


@torch.no_grad()
@pytest.mark.parametrize("gains", [True, False])
def test_layers_that_are_slower_only_by_themselves(gains: bool, monkeypatch: pytest.MonkeyPatch):
    """They compute in int8 where the program around them is faster, and else in float."""

    def timed(layer: nn.Module, make: Any, x: Tensor, *, kind: Any = None) -> Timing:
        return Timing(tuple(x.shape), 1.0, 2.0 if layer.kernel_size == (3, 3) else 0.5)

    def race(calls: list[Any], **_: Any) -> list[float]:
        module = calls[0].func
        assert program_of(module, calls[0].args[0].shape) and not module.deep.floats
        assert calls[1].func.deep.floats and not calls[1].func.wide.floats
        return [1.0, 2.0] if gains else [2.0, 1.0]

    monkeypatch.setattr(speed, "time_layers", timed)
    monkeypatch.setattr(speed.clock, "race", race)
    monkeypatch.setattr(whole, "slower_as_a_whole", lambda *_: None)
    small = quantize.quantize_dynamic(nn.Sequential(Mobile(), nn.Flatten()).eval())
    program = program_of(small[0], torch.Size([1, 32, 8, 8]))
    assert small[0].deep.floats != gains and (program is not None) == gains


@torch.no_grad()
def test_an_argument_that_is_left_out():
    """The program is the branch without it, and a call with it runs the forward."""
    module, x = region(Optional), randn(2, 32, 8, 8)
    program = program_of(module, x.shape)
    assert program is not None and program.ops[-1].ending.low == 0
    assert torch.equal(module(x), module(x, scale=x).relu())


@torch.no_grad()
def test_a_forward_that_changes_its_input():
    """It runs itself."""
    module = region(Adds)
    x = randn(2, 32, 8, 8)
    given = x.clone()
    assert module(x) is x and not torch.equal(x, given) and program_of(module, x.shape) is None


@torch.no_grad()
def test_watched_changed_and_refused():
    """Hooks inside are called, a weight that changes counts, and wrong inputs are refused as
    before.
    """
    module, x = region(blocks), randn(2, 32, 8, 8)
    before, seen = module(x), []
    handle = module[0].middle.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(module(x), before) and seen == [1]
    handle.remove()
    module[2].last.scale.mul_(2)
    after = module(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, type(module).own_forward(module, x))
    module[2].last = Int8Conv.from_layer(nn.Conv2d(32, 48, 1))
    assert torch.equal(module(x), type(module).own_forward(module, x))
    with pytest.raises(ValueError, match="31 channels"):
        module(randn(2, 31, 8, 8))


@torch.no_grad()
def test_a_weight_that_two_regions_hold():
    """Each keeps its own bias."""
    first, x = region(blocks), randn(2, 32, 8, 8)
    second = copy.deepcopy(first)
    for own, other in zip(first.modules(), second.modules(), strict=True):
        if isinstance(own, Int8Conv) and isinstance(other, Int8Conv):
            other.packed, other.bias = own.packed, None
    expected = [type(first).own_forward(one, x) for one in (first, second)]
    for _ in range(2):
        assert torch.equal(first(x), expected[0]) and torch.equal(second(x), expected[1])


@torch.no_grad()
def test_copies_and_files(tmp_path):
    """A deep copy, a pickle and a file are regions and answer with the same bits."""
    plain, x = nn.Sequential(blocks(), nn.Flatten()).eval(), randn(2, 32, 8, 8)
    model = in_int8(plain, calibration=[x])
    quantize.save(model, tmp_path / "model.pth")
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies.append(quantize.load(tmp_path / "model.pth", model=copy.deepcopy(plain)))
    for one in copies:
        assert isinstance(one[0], Region) and torch.equal(one(x), model(x))


@pytest.mark.slow
@torch.no_grad()
def test_in_graphs():
    """torch.compile and a trace see the modules inside."""
    module, x = region(blocks), randn(2, 32, 8, 8)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), module(x))
    assert torch.allclose(torch.jit.trace(module, x)(x), module(x), atol=1e-5)
