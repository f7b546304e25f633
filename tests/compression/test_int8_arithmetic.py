"""An int8 layer against its definition: the same bits from every kernel."""

from __future__ import annotations

from functools import partial

import helpers
import pytest
import torch
from helpers import linear, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_models import assert_kernels_give, layer_of
from torch import nn

from quantize.nn import int8_kernels as kernels
from quantize.nn.int8 import Int8Linear
from quantize.nn.int8_rows import quantize_many_rows
from quantize.nn.int8_stock import stock


def exact(x: torch.Tensor, layer: Int8Linear) -> torch.Tensor:
    """The layer in float64 from the definition, the activation quantized by row to 8 bits."""
    rows = x.reshape(-1, x.shape[-1]).double()
    low, high = rows.amin(1, keepdim=True).clamp_max(0), rows.amax(1, keepdim=True).clamp_min(0)
    step = ((high - low) / 255).clamp_min(1e-30)
    zero = (-low / step).round()
    q = ((rows / step).round() + zero).clamp(0, 255) - zero
    y = q @ layer.packed.double().t() * layer.scale.double() * step
    y = y if layer.bias is None else y + layer.bias.double()
    return y.reshape(*x.shape[:-1], -1)


# The arithmetic.
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70), st.booleans())
@settings(max_examples=25)
def test_layer_follows_its_definition(m: int, k: int, n: int, bias: bool):
    """Any width, odd ones and 1 among them, gives the float64 result up to activations on the other
    side of a half.
    """
    layer, x = layer_of(k, n, bias), randn(m, k)
    difference = (layer(x).double() - exact(x, layer)).abs()
    both = torch.cat((x, torch.zeros(m, 1)), 1).double()
    one_step = layer.scale.double() * 127 * (both.amax(1) - both.amin(1))[:, None] / 255
    assert (difference <= one_step + 1e-6).all()
    assert (difference <= 1e-5).double().mean() > 0.9


@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (1, 512, 96), (5, 1030, 7), (300, 64, 64), (70, 2100, 33)]
)
def test_kernels_agree_to_the_bit(shape: tuple[int, int, int]):
    """The reference and the fast kernel give the same bits, so neither the stopwatch nor the CPU
    changes an answer.
    """
    m, k, n = shape
    layer, x = layer_of(k, n), randn(m, k)
    assert_kernels_give(layer, x, layer(x))


def test_largest_sums_do_not_saturate():
    """All weights at 127 and all activations at 255 steps, the case that 16-bit accumulators get
    wrong, is exact.
    """
    layer = Int8Linear(torch.full((8, 256), 127, dtype=torch.int8), torch.ones(8))
    expected = torch.full((4, 8), 127.0 * 255 * 256)
    assert_kernels_give(layer, torch.full((4, 256), 255.0), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_their_batch(dtype: torch.dtype):
    """A row alone, in a batch, and in a batch cut into chunks has the same bits: cached and
    uncached decoding agree.
    """
    # more than the numbers that are quantized at a time
    layer, x = (
        layer_of(48, 4096),
        randn(3000, 48).to(dtype),
    )
    together = layer(x)
    assert torch.equal(together[:1], layer(x[:1]))
    assert torch.equal(together[300:333], layer(x[300:333]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 100])
def test_compiled_layer_gives_the_same_bits(rows: int, dtype: torch.dtype):
    """Captured whole by torch.compile, for few rows and for many, the layer computes what it does
    in eager mode.
    """
    layer, x = layer_of(48, 32), randn(rows, 48).to(dtype)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def test_exported_layer_holds_stock_operations_only():
    """A graph that leaves the process calls nothing of this package."""
    for strict in (False, True):
        program = torch.export.export(
            nn.Sequential(layer_of(48, 32)), (randn(100, 48),), strict=strict
        )
        assert "_int_mm" in str(program) and "quantize." not in str(program.graph)


def test_weight_error_is_half_a_step():
    """Every weight is within half a quantization step of its own channel."""
    layer, source = layer_of(50, 20), linear(50, 20)
    error = (layer.dense_weight() - source.weight).abs()
    assert (error <= 0.5001 * layer.scale[:, None]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_output_has_the_dtype_of_the_input(dtype: torch.dtype):
    """fp16, bf16 and fp64 inputs work, and come out as they went in."""
    layer, x = layer_of(32, 16), randn(3, 5, 32)
    y = layer(x.to(dtype))
    assert y.dtype == dtype and y.shape == (3, 5, 16)
    helpers.assert_close(y, layer(x.to(dtype).float()))


def test_strides_do_not_matter():
    """Transposed, sliced, expanded (stride 0) and empty inputs give what their contiguous copies
    give.
    """
    layer, x = layer_of(32, 16), randn(64, 64)
    for view in (
        x.t()[:, :32],
        x[::2, ::2],
        x[:, 7:39],
        x[0, :32].expand(5, 32),
        x[:3, :1].expand(3, 32),
        x[:0, :32],
    ):
        assert torch.equal(layer(view), layer(view.contiguous()))
    assert layer(torch.empty(2, 0, 32)).shape == (2, 0, 16)
    assert layer(x[0, :32]).shape == (16,)


def test_a_bad_row_spoils_only_itself():
    """NaN and infinity make their own row not finite and leave the others alone."""
    layer, x = layer_of(32, 16), randn(4, 32)
    good = layer(x)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    y = layer(x)
    assert not torch.isfinite(y[1]).any() and not torch.isfinite(y[2]).any()
    assert torch.equal(y[[0, 3]], good[[0, 3]])


def test_a_row_of_zeros_gives_the_bias():
    """Nothing is divided by zero."""
    layer = layer_of(32, 16)
    assert torch.equal(layer(torch.zeros(2, 32)), layer.bias.expand(2, 16))


def test_many_rows_are_quantized_like_few():
    """The path that works a piece at a time gives the same integers and scales, in every float
    dtype.
    """
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = randn(900, 300).to(dtype)
        x[5] = 0
        rows, many = kernels.quantize_rows(x), quantize_many_rows(x)
        assert all(map(torch.equal, rows, many))


def test_a_remembered_input_is_forgotten_when_it_changes():
    """Layers that share an input quantize it once, but never use what it was before a change in
    place.
    """
    first, second, x = layer_of(32, 16), layer_of(32, 8), randn(4, 32)
    first(x)
    y = second(x)
    assert torch.equal(y, second(x.clone()))
    x.mul_(-2)
    assert torch.equal(second(x), second(x.clone()))
    with torch.inference_mode():
        z = x + 1
        first(z)
        z.mul_(3)
        assert torch.equal(second(z), second(z.clone()))


def test_wrong_inputs_are_named():
    """A wrong width and an integer input say what was given and what is taken."""
    layer = layer_of(32, 16)
    with pytest.raises(ValueError, match="31, but the layer takes 32"):
        layer(randn(2, 31))
    with pytest.raises(TypeError, match="int64"):
        layer(torch.ones(2, 32, dtype=torch.int64))
    with pytest.raises(ValueError, match="must be one of"), kernels.kernel("fast"):
        pass


def test_a_wrong_switch_is_named(monkeypatch: pytest.MonkeyPatch):
    """What QUANTIZE_INT8_KERNEL says is checked where it is used."""
    monkeypatch.setattr(kernels, "_forced", "fast")
    with pytest.raises(ValueError, match="QUANTIZE_INT8_KERNEL must be one of"):
        layer_of(8, 8)(randn(2, 8))


def test_a_kernel_that_saturates_is_not_chosen():
    """Where oneDNN's sums saturate, as on CPUs without VNNI, the exact reference runs."""

    def saturating(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (q.float() @ weight.float().t()).clamp(max=32767).to(torch.int32)

    wrong = partial(stock, saturating)
    candidates = {"int_mm": wrong, "onednn": wrong, "reference": kernels.STOCK["reference"]}
    assert kernels._fastest(4, 8, 256, candidates) is kernels.STOCK["reference"]
