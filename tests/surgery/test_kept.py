"""Layers that a forward finds elsewhere than among the modules of its model."""

from __future__ import annotations

import functools
from collections import OrderedDict, deque, namedtuple

import pytest
import torch
from helpers import in_int8, linear, randn
from torch import Tensor, nn
from transformers.activations import GELUActivation

import quantize
from quantize import surgery

Both = namedtuple("Both", "first second")


class Holder:
    """An object that is no module."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x)


def closure(layer: nn.Module):
    """A function that holds the layer."""
    return lambda x: layer(x)


def call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


WAYS = {
    "list": lambda layer: [(layer,)],
    "dict": lambda layer: OrderedDict(layer=[layer]),
    "deque": lambda layer: deque([layer]),
    "named tuple": lambda layer: Both(None, layer),
    "object": Holder,
    "partial": lambda layer: functools.partial(call, layer),
    "bound method": lambda layer: layer.forward,
    "closure": closure,
}


class Keeps(nn.Module):
    """Calls its second layer by way of a plain attribute."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.second = linear(32, 32), linear(32, 8, seed=1)
        self.kept = WAYS[way](self.second)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.kept
        while not callable(layer):
            layer = next(iter(layer.values())) if isinstance(layer, dict) else layer[-1]
        return layer(self.first(x).relu())


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_that_is_kept_is_replaced(way: str, tmp_path):
    """The int8 layer runs, after loading into an instance of other weights too; the original's runs
    in the original.
    """
    model, x = Keeps(way).eval(), randn(4, 32)
    with torch.no_grad():
        before = model(x)
        small = in_int8(model)
        expected = small.second(small.first(x).relu())
        assert torch.equal(small(x), expected)
        assert torch.equal(model(x), before) and not torch.equal(before, expected)
        quantize.save(small, tmp_path / "small.pth")
        fresh = Keeps(way)
        for parameter in fresh.parameters():
            parameter.zero_()
        assert torch.equal(quantize.load(tmp_path / "small.pth", model=fresh)(x), expected)


class KeepsFeatures(nn.Module):
    """A hook that holds the model writes what its first layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.seen = linear(32, 32), torch.zeros(())
        self.first.register_forward_hook(lambda layer, args, output: self.keep(output))

    def keep(self, output: Tensor) -> None:
        self.seen = output

    def forward(self, x: Tensor) -> Tensor:
        self.first(x)
        return self.seen


def test_a_hook_of_a_copy_holds_the_copy():
    """A copy writes nothing into the original."""
    model, x = KeepsFeatures(), randn(4, 32)
    copied = surgery.clone(model)
    assert torch.equal(copied(x), copied.first(x)) and model.seen.ndim == 0


def test_a_module_with_a_bound_method_of_its_own_is_replaced():
    """transformers' GELU in Python calls one; it goes on working where somebody holds it."""
    gelu, x = GELUActivation(use_gelu_python=True), randn(4, 32)
    model = surgery.replace(nn.Sequential(linear(32, 32), gelu), {gelu: nn.Identity()})
    assert torch.equal(model(x), model[0](x))
    assert torch.allclose(gelu(x), nn.functional.gelu(x))
