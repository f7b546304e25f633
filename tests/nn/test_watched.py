"""Recorded calls are used no longer than what a forward depends on stays as it was."""

import functools
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest
import recorded_blocks
import torch
from helpers import randn
from recorded_blocks import Block, Inner, int8, is_replayed, own
from torch import Tensor, nn

from quantize import quantize_dynamic
from quantize.native import held
from quantize.nn.int8_region import Region

CHANGES: dict[str, Callable[[Any], object]] = {
    "an attribute": lambda block: setattr(block, "more", lambda block, x: x + 1),
    "a config": lambda block: setattr(block.config, "causal", True),
    "a layer": lambda block: setattr(block, "norm", nn.Identity()),
    "a layer's attribute": lambda block: setattr(block.norm, "eps", 1.0),
    "a weight": lambda block: setattr(block.norm, "weight", nn.Parameter(torch.zeros(32))),
    "its numbers": lambda block: block.norm.weight.mul_(3),
    "packed numbers": lambda block: block.q.packed.zero_(),
    "a hook": lambda block: block.out.register_forward_hook(lambda m, x, y: y + 1),
    "a hook before": lambda block: block.norm.register_forward_pre_hook(lambda m, x: (x[0] * 2,)),
    "a forward": lambda block: setattr(block.out, "forward", lambda x: x),
    "nothing that counts": lambda block: delattr(block, "last"),
    "a dtype": lambda block: block.norm.double(),
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_changes_of_the_module_count(name: str):
    """From the next call on."""
    block, x = int8(), randn(2, 5, 32)
    assert is_replayed(block, x)
    before = block(x)
    CHANGES[name](block)
    if name == "a dtype":
        with pytest.raises(RuntimeError):
            block(x)
        return
    actual = block(x)
    assert torch.equal(actual, own(block, x))
    assert torch.equal(actual, before) == (name == "nothing that counts")


HOLDERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another object that is equal": lambda held: held.update(first=[1, 2]),
    "a key that is gone": lambda held: held.pop("first"),
    "one more": lambda held: held.update(third=None),
    "None in its place": lambda held: held.update(first=None),
    "one gone, one more": lambda held: held.update(third=held.pop("second")),
}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", HOLDERS)
def test_what_dictionaries_hold(name: str, native: bool, monkeypatch: pytest.MonkeyPatch):
    """The very objects, by native code and without it."""

    def missing() -> Any:
        raise OSError

    if not native:
        monkeypatch.setattr(held, "functions", missing)
    values: dict[str, Any] = {"first": [1], "second": None}
    seen = held.Held([(values, *item) for item in values.items()], [values])
    assert seen.are_there()
    values["first"].append(2)
    assert seen.are_there()
    HOLDERS[name](values)
    assert not seen.are_there()


class Settings:
    """As programs keep them: nobody makes one."""

    factor = 1.0


class Slots:
    __slots__ = ("factor",)


HERE = sys.modules[__name__]
ARRAY = np.ones(1, dtype=np.float32)
SLOTS = Slots()
CURRENT = ContextVar("CURRENT", default=1.0)
FACTOR = 1.0
TABLE = torch.ones(32)
FACTORS = {"last": [1.0]}
CHANGE: list[Callable[[float], None]] = []


def scaled_by_a_variable(block: Any, x: Tensor) -> Tensor:
    return x * FACTOR


def scaled_by_a_default(block: Any, x: Tensor, factors: Any = [1.0]) -> Tensor:  # noqa: B006
    return x * factors[-1]


def enclosing() -> Callable[[Any, Tensor], Tensor]:
    """A function of a variable that another one sets."""
    factor = 1.0

    def change(value: float) -> None:
        nonlocal factor
        factor = value

    CHANGE.append(change)
    return lambda block, x: x * factor


class Bare:
    rate = 1.0


class Attributes(dict[str, float]):
    rate = 1.0


class Described:
    factor = 1.0

    def __get__(self, owner: Any, kind: Any = None) -> float:
        return self.factor


class Factor:
    def __call__(self) -> float:
        return FACTOR


class Knob:
    """What code may reach without naming it."""

    described = Described()

    def __init__(self) -> None:
        self.factor = Factor()

    def __mul__(self, x: Tensor) -> Tensor:
        return x * FACTOR


def unchanged() -> float:
    return unchanged.factor  # type: ignore[attr-defined, no-any-return]


unchanged.factor = 1.0  # type: ignore[attr-defined]
TABLES = {"factor": 1.0}
REACHED: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any], object]]] = {
    "an object in a config": (
        lambda block, x: x * block.config.inner.factor,
        lambda block: setattr(block.config.inner, "factor", 2.0),
    ),
    "a function with a state": (
        lambda block, x: block.last(x),
        lambda block: setattr(block.last, "factor", 2.0),
    ),
    "an object without attributes": (
        lambda block, x: x * block.config.bare.rate,
        lambda block: setattr(block.config.bare, "rate", 2.0),
    ),
    "an attribute of a dictionary": (
        lambda block, x: x * block.config.named.rate,
        lambda block: setattr(block.config.named, "rate", 2.0),
    ),
    "a hook of a module in a list": (
        lambda block, x: block.config.layers[0](x),
        lambda block: block.config.layers[0].register_forward_hook(lambda m, x, y: 2 * y),
    ),
    "an empty list": (
        lambda block, x: x + len(block.config.none),
        lambda block: block.config.none.append(1),
    ),
    "a list in a dictionary": (
        lambda block, x: x * block.config.rope["factors"][0],
        lambda block: block.config.rope["factors"].__setitem__(0, 2.0),
    ),
    "a queue": (
        lambda block, x: x + block.config.inner.last[0],
        lambda block: block.config.inner.last.extend([1.0, 2.0]),
    ),
    "a class": (lambda block, x: x * block.scale, lambda block: setattr(Block, "scale", 2.0)),
    "a class in a variable": (
        lambda block, x: x * Settings.factor,
        lambda block: setattr(Settings, "factor", 2.0),
    ),
    "a context": (lambda block, x: x * CURRENT.get(), lambda block: CURRENT.set(2.0)),
    "the class of an object in a config": (
        lambda block, x: x * block.config.inner.rate,
        lambda block: setattr(Inner, "rate", 2.0),
    ),
    "a variable that a method of an object names": (
        lambda block, x: x * block.config.inner.known(),
        lambda block: setattr(recorded_blocks, "FACTOR", 2.0),
    ),
    "a dtype": (
        lambda block, x: x.to(block.out.like.dtype),
        lambda block: setattr(block.out.like, "data", block.out.like.data.bfloat16()),
    ),
    "a variable": (scaled_by_a_variable, lambda block: setattr(HERE, "FACTOR", 2.0)),
    "a variable's content": (
        lambda block, x: x * FACTORS["last"][0],
        lambda block: FACTORS["last"].__setitem__(0, 2.0),
    ),
    "numbers of a variable": (lambda block, x: x * TABLE, lambda block: TABLE.mul_(2)),
    "a variable of another module": (
        lambda block, x: x * recorded_blocks.FACTOR,
        lambda block: setattr(recorded_blocks, "FACTOR", 2.0),
    ),
    "a variable of a function around": (enclosing(), lambda block: CHANGE[0](2.0)),
    "a function": (
        lambda block, x: scaled_by_a_variable(block, x),
        lambda block: setattr(HERE, "scaled_by_a_variable", lambda block, x: x + 1),
    ),
    "a variable by its name": (
        lambda block, x: x * globals()["FACTOR"],
        lambda block: setattr(HERE, "FACTOR", 2.0),
    ),
    "a variable of a module by its name": (
        lambda block, x: x * sys.modules[__name__].FACTOR,
        lambda block: setattr(HERE, "FACTOR", 2.0),
    ),
    "a method by its name": (
        lambda block, x: x * getattr(block.config.inner, "known")(),  # noqa: B009
        lambda block: setattr(recorded_blocks, "FACTOR", 2.0),
    ),
    "a variable that a call of an object names": (
        lambda block, x: x * block.config.knob.factor(),
        lambda block: setattr(HERE, "FACTOR", 2.0),
    ),
    "a variable that an operator names": (
        lambda block, x: block.config.knob * x,
        lambda block: setattr(HERE, "FACTOR", 2.0),
    ),
    "an attribute of a descriptor": (
        lambda block, x: x * block.config.knob.described,
        lambda block: setattr(vars(Knob)["described"], "factor", 2.0),
    ),
    "an attribute of a function": (
        lambda block, x: x * unchanged(),
        lambda block: setattr(unchanged, "factor", 2.0),
    ),
    "a table behind a method": (
        lambda block, x: x * block.config.look_up("factor"),
        lambda block: TABLES.update(factor=2.0),
    ),
    "a variable that a part of a function names": (
        lambda block, x: block.config.part(x),
        lambda block: setattr(HERE, "FACTOR", 2.0),
    ),
    "a variable that a method of another object names": (
        lambda block, x: x * block.config.method(),
        lambda block: setattr(recorded_blocks, "FACTOR", 2.0),
    ),
    "threads": (
        lambda block, x: x * torch.get_num_threads(),
        lambda block: torch.set_num_threads(torch.get_num_threads() + 1),
    ),
    "a default": (
        scaled_by_a_default,
        lambda block: scaled_by_a_default.__defaults__[0].append(2.0),
    ),
}


@pytest.mark.parametrize("name", REACHED)
@torch.no_grad()
def test_changes_of_what_is_reached_count(name: str, monkeypatch: pytest.MonkeyPatch):
    """From the next call on, however deep it lies."""
    monkeypatch.setattr(Block, "scale", 1.0)  # and put it back
    CURRENT.set(1.0)
    monkeypatch.setattr(Inner, "rate", 1.0)
    monkeypatch.setattr(Settings, "factor", 1.0)
    monkeypatch.setattr(HERE, "FACTOR", 1.0)
    monkeypatch.setattr(HERE, "scaled_by_a_variable", scaled_by_a_variable)
    monkeypatch.setattr(recorded_blocks, "FACTOR", 1.0)
    threads = torch.get_num_threads()
    more, change = REACHED[name]
    block, x = int8(lambda block: setattr(block, "more", more)), randn(2, 5, 32)
    block.last = block.config.inner
    block.config.knob, block.config.look_up = Knob(), TABLES.get
    block.config.part = functools.partial(scaled_by_a_variable, None)
    block.config.named, block.config.layers = Attributes(), [nn.GELU()]
    block.config.method, block.config.bare, block.config.none = Inner().known, Bare(), []
    assert is_replayed(block, x)
    before = block(x)
    change(block)
    actual, expected = block(x), own(block, x)
    torch.set_num_threads(threads)
    assert torch.equal(actual, expected) and not torch.equal(actual, before)


@pytest.mark.parametrize(
    "more", [lambda block, x: x * float(ARRAY[0]), lambda block, x: x * SLOTS.factor]
)
@torch.no_grad()
def test_an_array_or_slots_in_a_variable_count(more: Callable[[Any, Tensor], Tensor]):
    """Nobody can see whether what they hold changes."""
    x = randn(2, 5, 32)
    block = int8(lambda block: setattr(block, "more", more))
    for factor in (1, 2):
        ARRAY.fill(factor)
        SLOTS.factor = factor
        for _ in range(4):
            assert torch.equal(block(x), own(block, x))


class Named(nn.Module):
    """Layers that take a dictionary and write into it, as those of sentence encoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.register_buffer("shift", torch.ones(2, 32))

    def forward(self, given: dict[str, Tensor] | Tensor, *, scaled: bool = False) -> Tensor:
        x = given if isinstance(given, Tensor) else given["x"]
        y = self.down(self.up(x)) + self.shift
        if not isinstance(given, Tensor):
            given["y"] = y
        return y * given.factor if scaled else y


@torch.no_grad()
def test_arguments_are_used_as_by_the_forward():
    """A dictionary is written into; attributes of a tensor are read, and a tensor of the module
    isn't taken for another input.
    """
    block: Any = quantize_dynamic(Named().eval(), prefer="size")
    assert isinstance(block, Region)
    for number in range(5):
        given = {"x": randn(2, 32)}
        y = block(given)
        assert given["y"] is y
        x = randn(2, 32)
        x.factor = number  # type: ignore[attr-defined]
        assert torch.equal(block(x, scaled=True), number * own(block, x))
        shift = block.shift if number < 3 else x.clone()
        assert torch.equal(block(shift), own(block, shift))
