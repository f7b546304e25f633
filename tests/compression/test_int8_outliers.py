"""Int8 layers some of whose channels count in float: the same bits from every kernel and graph."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import in_int8, linear, mlp, randn
from int8_models import KERNELS, assert_kernels_give, by_reference_and_level
from torch import Tensor, nn

import quantize
from quantize import surgery
from quantize.native import isa
from quantize.nn import int8_kernels as kernels
from quantize.nn.int8_outliers import Int8OutlierLinear


def layer_of(k: int, n: int, channels: tuple[int, ...], bias: bool = True) -> Int8OutlierLinear:
    source = linear(k, n, bias)
    factor = randn(k, seed=3).abs() + 0.5
    return Int8OutlierLinear.from_outliers(
        source.weight, source.bias, factor, torch.tensor(channels, dtype=torch.int64)
    )


def rows_of(m: int, k: int) -> Tensor:
    """Rows that one channel dominates."""
    x = randn(m, k)
    x[:, 1] += 40
    return x


def test_layer_follows_the_float_one():
    """Channels in float take the largest numbers out of the steps, and nothing is lost of them."""
    source, x = linear(100, 37), rows_of(70, 100)
    layer, plain = layer_of(100, 37, (1, 3)), quantize.nn.int8.Int8Linear
    with torch.no_grad():
        expected = source(x)
        error = (layer(x) - expected).norm()
        assert 3 * error < (plain.from_weight(source.weight, source.bias)(x) - expected).norm()
        half_a_step = 0.5001 * layer.scale[:, None] * layer.factor
        assert ((layer.dense_weight() - source.weight).abs() <= half_a_step + 1e-7).all()
        assert torch.equal(layer.dense_weight()[:, [1, 3]], source.weight[:, [1, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("channels", [(), (1,), (1, 0, 9, 5)])
def test_kernels_agree_to_the_bit(channels: tuple[int, ...], dtype: torch.dtype):
    """With any number of channels, rows above and below a tile, with a bias and without."""
    for rows, k, n, bias in ((3, 100, 37, True), (70, 64, 48, False)):
        layer, x = layer_of(k, n, channels, bias), rows_of(rows, k).to(dtype)
        chosen = layer(x)
        assert torch.equal(layer(x), chosen)
        assert_kernels_give(layer, x, chosen)


@pytest.mark.parametrize("level", isa.levels())
def test_instruction_sets_agree_to_the_bit(level: str, monkeypatch: pytest.MonkeyPatch):
    """The kernels of each instruction set give what the reference gives; a bad row spoils only
    itself.
    """
    layer, x = layer_of(100, 37, (1, 8)), rows_of(40, 100)
    x[3, 1], x[5, 7], x[7] = math.inf, math.nan, 0
    expected, y = by_reference_and_level(layer, x, level, monkeypatch)
    assert torch.equal(y.nan_to_num(0), expected.nan_to_num(0))
    assert y[[3, 5]].isnan().all() and y.isfinite().all(1).sum() == 38


def test_graphs_give_the_same_bits():
    """Traced, exported and compiled."""
    layer, x = layer_of(64, 48, (1, 2)), rows_of(9, 64)
    y = layer(x)
    assert torch.equal(torch.jit.trace(layer, x)(x), y)
    program = torch.export.export(nn.Sequential(layer), (x,))
    assert "quantize." not in str(program.graph)
    assert torch.equal(program.module()(x), y)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), y)
    operands = x, layer.packed, layer.scale, layer.bias, *layer.outliers()
    torch.library.opcheck(
        torch.ops.quantize.int8_linear.default,
        operands,
        test_utils=("test_schema", "test_faketensor"),
    )


def test_changes_are_seen():
    """Channels that somebody writes into count from the next call on."""
    layer, x = layer_of(64, 48, (1, 2)), rows_of(9, 64)
    before = [layer(x) for _ in range(3)][-1]
    for change in (layer.kept.zero_, lambda: layer.factor.mul_(2), lambda: layer.channels.add_(1)):
        change()
        y = layer(x)
        with kernels.kernel("reference"):
            assert torch.equal(layer(x), y)
        assert not torch.equal(y, before)


@pytest.mark.parametrize("channels", [[-1], [64], [1 << 40]])
def test_channels_that_are_none_are_refused(channels: list[int]):
    """Memory beside the input is never read: by the layer, and when a file is loaded."""
    layer = layer_of(64, 48, ())
    layer.channels = torch.tensor(channels)
    layer.kept = torch.zeros(len(channels), 48)
    assert "channels must be" in layer.contradiction()
    with kernels.kernel(KERNELS[0]), pytest.raises((ValueError, RuntimeError)):
        layer(rows_of(2, 64))


def test_a_model_is_saved_and_opened(tmp_path):
    """A model with such a layer keeps its bits in a file."""
    model, x = mlp(24, 40, 8), rows_of(50, 24)
    small = in_int8(model, calibration=[x])
    assert isinstance(small[0], Int8OutlierLinear)
    layers = [edit for edit in surgery.structure(small) if edit["module"] == "0"]
    assert layers[0]["arguments"]["outliers"] == 1
    quantize.save(small, tmp_path / "small.safetensors")
    again = quantize.load(tmp_path / "small.safetensors", model=mlp(24, 40, 8))
    assert torch.equal(again(x), small(x))
    assert torch.equal(small.double()(x.double()).float(), small.float()(x))


def test_few_rows_of_calibration_mislead_nobody():
    """Channels that are silent in a few rows get no factor that ruins rows where they aren't."""
    model = nn.Sequential(linear(32, 128), nn.ReLU(), linear(128, 10, seed=1)).eval()
    rows, unseen = randn(5, 32, seed=1), randn(200, 32, seed=2)
    with torch.no_grad():
        expected = model(unseen)
        errors = [
            (in_int8(model, calibration=given)(unseen) - expected).norm()
            for given in (None, [rows])
        ]
    assert errors[1] <= 1.2 * errors[0]
