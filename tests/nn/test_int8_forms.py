"""Inputs of ever other forms: which of them are recorded, and what the others cost."""

from typing import Any

import pytest
import torch
from helpers import randn
from recorded_blocks import int8, is_replayed, own, tapes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import quantize
from quantize.nn import int8_kernels as kernels
from quantize.nn import replay


@torch.no_grad()
def test_a_form_after_the_first_is_recorded_once(monkeypatch: pytest.MonkeyPatch):
    """Its second call makes its tape, by native kernels alone: others would take much longer."""
    block, x = int8(), randn(2, 7, 32)
    with kernels.kernel("native"):
        assert is_replayed(block, randn(2, 5, 32))
        monkeypatch.setattr(kernels, "STOCK", {})  # kernels for tensors that native code can't read
        block(x), block(x)
        assert [tape is not None for _, tape in tapes(block)] == [True, True]
        assert torch.equal(block(x), own(block, x))


@torch.no_grad()
def test_layers_in_a_forward_that_looks_at_numbers():
    """They are recorded in the very calls in which it can't be."""

    class Outer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x if x.sum() < 1e9 else -x)

    outer: Any = Outer()
    outer.inner = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    small: Any = quantize.quantize_dynamic(outer.eval(), prefer="size")
    x = randn(3, 32)
    for _ in range(4):
        small(x)
    assert [tape for _, tape in tapes(small)] == [None]
    assert [tape is not None for _, tape in tapes(small.inner)] == [True]
    assert torch.equal(small(x), own(small, x))


@torch.no_grad()
def test_recordings_take_a_share_of_the_time(monkeypatch: pytest.MonkeyPatch):
    """Beyond the first forms; layers inside of a module that waits for its turn aren't recorded in
    its place.
    """
    monkeypatch.setattr(replay, "_SHARE", 0.0)
    block = int8()
    for length in range(1, 20):
        x = randn(1, length, 32)
        for _ in range(4):
            assert torch.equal(block(x), own(block, x))
    assert len(tapes(block)) == replay._FIRST - 1
    monkeypatch.setattr(replay, "_SHARE", 1e9)
    assert is_replayed(block, randn(1, 19, 32))


@torch.no_grad()
def test_forms_that_come_twice_alone_are_not_recorded_for_ever(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(replay, "_SHARE", 0.0)
    block = int8()
    for length in range(1, 20):
        x = randn(1, length, 32)
        block(x), block(x)
    assert replay._regions[block].recordings == replay._FIRST


def test_what_runs_under_a_mode_is_not_remembered():
    """Fake tensors, and those that transforms of functions wrap, would stand in later results."""
    (layer,) = quantize.quantize_dynamic(nn.Sequential(nn.Linear(32, 16)), prefer="size")
    x = randn(15, 32)
    expected = layer(x).detach()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer(mode.from_tensor(x[:9]))
    torch.func.grad(lambda w: (layer(x[:10].detach()) * w).sum())(torch.ones(16))
    torch.func.vmap(layer)(x[:12].view(2, 6, 32))
    for rows in range(8, 16):
        assert torch.equal(layer(x[:rows]), expected[:rows])


@pytest.mark.parametrize("rows", [1, 6, 40])
@torch.no_grad()
def test_other_numbers_of_rows_have_the_same_bits(rows: int):
    """Those that a layer computes without further checks, since it computed about as many."""
    (layer,) = quantize.quantize_dynamic(nn.Sequential(nn.Linear(32, 16)), prefer="size")
    for count in (rows, rows + 1, rows + 2):
        x = randn(count, 32)
        with kernels.kernel("reference"):
            expected = layer(x)
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x[None].expand(2, -1, -1)), expected.expand(2, -1, -1))
    with pytest.raises(ValueError, match="last axis of the input is 16"):
        layer(randn(rows * 2, 16))


@torch.no_grad()
def test_many_forms():
    """Each is recorded when it comes again; old ones are forgotten."""
    block = int8()
    for length in range(1, replay._MOST_FORMS + 4):
        block(randn(1, length, 32))
    assert is_replayed(block, randn(1, 3, 32))
