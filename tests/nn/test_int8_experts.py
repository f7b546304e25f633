"""Experts in three-dimensional parameters, stored in int8: each multiplies as an Int8Linear of its
matrix does, bit for bit, however the forward asks for it.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close, in_int8, randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import quantize
from quantize.nn.int8 import Int8Linear
from quantize.nn.int8_experts import Int8Experts

EXPERTS, WIDTH, HIDDEN = 3, 24, 40
WAYS = ["linear", "matmul", "bmm", "grouped", "gathered", "einsum"]


class Experts(nn.Module):
    """Row r of the input goes to expert r modulo EXPERTS, in one of WAYS."""

    def __init__(self, way: str, inputs_first: bool | None) -> None:
        super().__init__()
        sizes = (HIDDEN, WIDTH) if inputs_first else (WIDTH, HIDDEN)
        self.up = nn.Parameter(0.2 * torch.randn(EXPERTS, *sizes))
        self.bias = nn.Parameter(0.1 * torch.randn(EXPERTS, WIDTH))
        self.num_experts, self.way = EXPERTS, way
        if inputs_first is not None:
            self.is_transposed = inputs_first

    def forward(self, x: Tensor) -> Tensor:  # [EXPERTS * n, HIDDEN]
        return self.products(x) + self.bias.repeat(len(x) // EXPERTS, 1)

    def products(self, x: Tensor) -> Tensor:
        first = getattr(self, "is_transposed", False)
        groups = x.view(-1, EXPERTS, HIDDEN).transpose(0, 1)  # [EXPERTS, n, HIDDEN]
        count = groups.shape[1]
        if self.way == "linear":
            each = [self.up[i].mT if first else self.up[i] for i in range(EXPERTS)]
            y = torch.stack([F.linear(g, w) for g, w in zip(groups, each, strict=True)])
        elif self.way == "matmul":
            each = [self.up[i] if first else self.up[i].t() for i in torch.arange(EXPERTS)]
            y = torch.stack([g @ w for g, w in zip(groups, each, strict=True)])
        else:
            weight = self.up if first else self.up.transpose(1, 2)  # [EXPERTS, HIDDEN, WIDTH]
            if self.way == "bmm":
                y = torch.bmm(groups, weight)
            elif self.way == "grouped":
                ends = torch.arange(1, EXPERTS + 1, dtype=torch.int32) * count
                y = F.grouped_mm(groups.reshape(-1, HIDDEN), weight, offs=ends)
                y = y.view(EXPERTS, count, WIDTH)
            elif self.way == "gathered":
                chosen = self.up[torch.arange(EXPERTS)]
                y = groups @ (chosen if first else chosen.mT)
            else:
                y = torch.einsum("enh,ehw->enw", groups, weight)
        return y.transpose(0, 1).reshape(-1, WIDTH)


def model(way: str = "linear", inputs_first: bool | None = False) -> nn.Module:
    return seeded(lambda: nn.Sequential(Experts(way, inputs_first), nn.Linear(WIDTH, 8))).eval()


def stored(small: Any) -> Int8Experts:
    return small[0].up_int8


@pytest.mark.parametrize("inputs_first", [False, True], ids=["out, in", "in, out"])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_each_expert_is_an_int8_linear(way: str, inputs_first: bool):
    """The bits of Int8Linear where a product shows; the weights it stands for elsewhere."""
    plain: Any = model(way, inputs_first)
    small: Any = in_int8(plain)
    x = randn(4 * EXPERTS, HIDDEN)
    matrices = plain[0].up.mT if inputs_first else plain[0].up
    layers = [Int8Linear.from_weight(matrix) for matrix in matrices]
    if way in ("gathered", "einsum"):
        groups = x.view(-1, EXPERTS, HIDDEN).transpose(0, 1)
        dense = torch.stack([layer.dense_weight() for layer in layers])
        expected = (groups @ dense.mT).transpose(0, 1).reshape(-1, WIDTH)
        assert_close(small[0].products(x), expected)
    else:
        rows = [layers[i % EXPERTS](row[None]) for i, row in enumerate(x)]
        assert torch.equal(small[0].products(x), torch.cat(rows))
    assert 0 < (small(x) - plain(x)).norm() / plain(x).norm() < 0.02


@pytest.mark.parametrize("inputs_first", [False, True], ids=["out, in", "in, out"])
@torch.no_grad()
def test_bits_stay_in_files_and_copies(tmp_path: Path, inputs_first: bool):
    """Saved, loaded, copied and pickled, also in 16 bits; a quarter of the bytes."""
    plain = model("grouped", inputs_first)
    x = randn(2 * EXPERTS, HIDDEN)
    for small in (in_int8(plain), quantize.to_half(in_int8(plain), torch.bfloat16)):
        expected = small(x)
        quantize.save(small, tmp_path / "m.safetensors")
        loaded = quantize.load(tmp_path / "m.safetensors", model=model("grouped", inputs_first))
        for other in (loaded, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
            assert torch.equal(other(x), expected)
            assert type(other[0]).__name__ == "Experts" and isinstance(other[0], Experts)
    assert stored(small).packed.nbytes == EXPERTS * WIDTH * HIDDEN


@torch.no_grad()
def test_reads_as_the_parameter():
    """Shape, dtype and numbers of what it stands for; writing is refused."""
    plain: Any = model("matmul", True)
    small: Any = in_int8(plain)
    assert small[0].up.shape == plain[0].up.shape and small[0].up.dtype is torch.float32
    steps = stored(small).scale.unsqueeze(1)  # of outputs, which come last
    assert ((small[0].up - plain[0].up).abs() <= 0.501 * steps).all()
    with pytest.raises(ValueError, match="can only be read"):
        small[0].up.zero_()
    exported = torch.export.export(small, (randn(EXPERTS, HIDDEN),)).module()
    assert_close(exported(randn(EXPERTS, HIDDEN)), small(randn(EXPERTS, HIDDEN)), factor=2000)


@torch.no_grad()
def test_changes_are_seen():
    """New numbers in what is stored give new results: no packed copy of the old ones is used."""
    small, other = in_int8(model("linear")), in_int8(seeded(lambda: model("linear"), 1))
    x = randn(EXPERTS, HIDDEN)
    small(x)
    small.load_state_dict(other.state_dict())
    assert torch.equal(small(x), other(x))


def test_experts_of_unknown_order_stay_in_float_for_speed():
    """Which axis is the input is unknown, so nothing can be timed: named, and size stores them."""
    plain = model("linear", None)
    fast = quantize.quantize_dynamic(nn.Sequential(plain, nn.LSTM(8, 8)))
    assert "which axis of its experts" in quantize.summary(fast).left["0.0"]
    small = in_int8(plain)
    assert quantize.summary(small).done["0.up_int8"] == "int8"
    assert "0" in quantize.summary(in_int8(plain, skip=["0"])).left


def test_experts_that_are_not_finite_are_named():
    plain: Any = model()
    plain[0].up.data[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="layer '0' has a up that is not finite"):
        in_int8(plain)


def test_an_error_limit_puts_experts_back():
    """`max_error` counts a module of experts as one layer."""
    plain = model("grouped")
    batches = [randn(4 * EXPERTS, HIDDEN, seed=seed) for seed in range(2)]
    whole = quantize.summary(in_int8(plain, calibration=batches)).distance
    assert whole is not None
    kept = in_int8(plain, calibration=batches, max_error=0.8 * whole)
    distance = quantize.summary(kept).distance
    assert distance is not None and distance <= 0.8 * whole
    assert quantize.summary(kept).left
