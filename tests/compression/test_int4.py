"""4-bit weights: the grid and GPTQ against what they promise, the kernel against the widened
weight, the transform.
"""

from __future__ import annotations

import copy
import pickle

import helpers
import pytest
import torch
from helpers import linear, mlp, randn
from torch import nn

import quantize
from quantize import quantize_weights, surgery
from quantize.nn import gptq, int4


def test_each_weight_is_within_half_a_step():
    """Rounding to the nearest misses a weight by at most half of its group's step (and the grid's
    own rounding).
    """
    source = linear(128, 48)
    layer = int4.Int4Linear.from_linear(source, 32)
    step = layer.scale.float().repeat_interleave(32, 1)
    assert ((layer.dense_weight() - source.weight).abs() <= 0.6 * step).all()


@pytest.mark.parametrize("size", [2.0**-100, 2.0**-30, 2.0**66])
def test_weights_of_any_size_keep_their_values(size: float):
    """The grid follows the weights, of which a power of two changes nothing: none vanish, none
    overflow.
    """
    source, x = linear(64, 16, bias=False), randn(3, 64)
    twin = int4.Int4Linear.from_linear(source, 32)(x)
    with torch.no_grad():
        source.weight.mul_(size)
    scaled = int4.Int4Linear.from_linear(source, 32)(x)
    helpers.assert_close(scaled / size, twin, dtype=torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("group_size", int4.GROUP_SIZES)
def test_layer_multiplies_the_weight_it_stands_for(rows: int, group_size: int):
    """The kernel for few rows and the product for many agree with the widened weight to
    bfloat16.
    """
    layer, x = int4.Int4Linear.from_linear(linear(256, 48), group_size), randn(rows, 256)
    expected = x @ layer.dense_weight().t() + layer.bias
    helpers.assert_close(layer(x), expected, dtype=torch.bfloat16)


def test_gptq_beats_rounding_to_the_nearest():
    """On correlated inputs the output error with GPTQ is clearly smaller."""
    source = linear(128, 64, bias=False)
    x = randn(2000, 8) @ randn(8, 128, seed=1) + 0.3 * randn(2000, 128, seed=2)
    exact = x @ source.weight.t()
    plain = int4.Int4Linear.from_linear(source, 32).dense_weight()
    better = int4.Int4Linear.from_linear(source, 32, x.t() @ x / len(x)).dense_weight()
    assert (x @ better.t() - exact).pow(2).mean() < 0.5 * (x @ plain.t() - exact).pow(2).mean()


def test_gptq_rounds_as_its_authors_do():
    """Column by column, each time with the others moved by the inverse moment's Cholesky factor."""
    weight, x = randn(24, 128), randn(600, 8) @ randn(8, 128, seed=1) + randn(600, 128, seed=2)
    moment = (x.t() @ x / len(x)).double()
    values, scale, zero = int4.quantize_groups_gptq(weight, 32, moment)
    damped = moment + gptq.DAMPING * moment.diagonal().mean() * torch.eye(128)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    moved, expected = weight.double(), torch.empty_like(values)
    for i in range(128):
        group = i // 32
        if i % 32 == 0:
            grid = int4._grid(moved[:, None, i : i + 32])
            assert torch.equal(grid[0][:, 0], scale[:, group])
        step, offset = scale[:, group, None], zero[:, group, None]
        expected[:, i : i + 1] = int4._to_grid(moved[:, i : i + 1], step, offset)
        rounded = int4._from_grid(expected[:, i : i + 1], step, offset)
        error = (moved[:, i : i + 1] - rounded) / factor[i, i]
        moved[:, i:] -= error * factor[i, i:]
    assert torch.equal(values, expected)


def test_transform_follows_the_model_and_its_record():
    """Outputs stay close, the input stays what it was, and the record rebuilds the same bits on a
    fresh model.
    """
    model, x = mlp(64, 96, 16), randn(2, 64)
    before = copy.deepcopy(model.state_dict())
    small = quantize_weights(model, calibration=[randn(64, 64, seed=1)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert helpers.cosine(small(x), model(x)) > 0.98
    fresh = surgery.rebuild(mlp(64, 96, 16), surgery.structure(small))
    fresh.load_state_dict({k: v.clone() for k, v in small.state_dict().items()}, assign=True)
    assert torch.equal(fresh(x), small(x))
    assert torch.equal(pickle.loads(pickle.dumps(small))(x), small(x))
    assert torch.equal(copy.deepcopy(small)(x), small(x))
    assert all(type(v) is torch.Tensor for v in small.state_dict().values())


def test_a_change_in_place_reaches_the_kernel():
    """The packed copy follows the weight."""
    layer, x = int4.Int4Linear.from_linear(linear(64, 32), 32), randn(1, 64)
    layer(x)
    layer.packed.bitwise_xor_(0xFF)
    helpers.assert_close(layer(x), x @ layer.dense_weight().t() + layer.bias, dtype=torch.bfloat16)


def test_traced_and_exported():
    """torch.jit.trace and torch.export run at another batch size, and give the widened product."""
    model, x = quantize_weights(mlp(64, 96, 16)), randn(20, 64)
    traced = torch.jit.trace(model, randn(3, 64), check_trace=False)
    exported = torch.export.export(
        model, (randn(3, 64),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    # eager multiplies in bfloat16 where that is fast
    helpers.assert_close(traced(x), model(x), dtype=torch.bfloat16)
    assert torch.equal(exported.module()(x), traced(x))


@pytest.mark.parametrize("group_size", [32, 64])
def test_the_quick_widening_is_the_weight(group_size):
    """Bit tricks and all: the bfloat16 nearest to the float32 weight."""
    layer = int4.Int4Linear.from_linear(nn.Linear(128, 24), group_size)
    assert torch.equal(layer._widened(), layer.dense_weight().bfloat16())


def test_what_does_not_fit_is_named():
    """Other bits, odd groups, widths that no group divides, and models with nothing to do."""
    with pytest.raises(ValueError, match="bits must be 4"):
        quantize_weights(mlp(64, 96, 16), bits=3)
    with pytest.raises(ValueError, match=r"group_size is .*; allowed: 32"):
        quantize_weights(mlp(64, 96, 16), group_size=48)
    small = quantize_weights(mlp(64, 96, 16), group_size=64)
    assert "no multiple of group_size=64" in quantize.summary(small).left["2"]
    with pytest.raises(ValueError, match="no linear layer"):
        quantize_weights(nn.Sequential(nn.ReLU()))
    bad = mlp(64, 96, 16)
    with torch.no_grad():
        bad[0].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="'0' has a weight that is not finite"):
        quantize_weights(bad)


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_zoo(name: str):
    """Models that others wrote keep their outputs (random weights: the roughest case for 4
    bits).
    """
    model, inputs = helpers.zoo(name)
    small = quantize_weights(model)
    assert helpers.cosine(helpers.run(small, inputs), helpers.run(model, inputs)) > 0.97


@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_transformers_are_converted_whole(batch_first: bool):
    """The projections of every attention become 4-bit; outputs, masks and files hold, in eval and
    training mode.
    """

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Transformer(64, 4, 1, 1, 64, dropout=0.0, batch_first=batch_first)

    model = make().eval()
    source, target = randn(5, 5, 64), randn(5, 5, 64, seed=1)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    small = quantize_weights(model)
    assert not any(isinstance(m, (nn.Linear, nn.MultiheadAttention)) for m in small.modules())
    fresh = surgery.rebuild(make(), surgery.structure(small))
    fresh.load_state_dict({k: v.clone() for k, v in small.state_dict().items()}, assign=True)
    for mode in (False, True):
        with torch.no_grad():
            expected, actual = (
                m.train(mode)(source, target, tgt_mask=mask) for m in (model, small)
            )
            assert helpers.cosine(actual, expected) > 0.97
            assert torch.equal(fresh.train(mode)(source, target, tgt_mask=mask), actual)


def test_an_attention_of_other_widths_is_left_whole():
    """Where no projection fits the group size, the attention stays what it was and each projection
    is named.
    """
    model = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(24, 4), "head": linear(64, 16)}
    ).eval()
    small = quantize_weights(model)
    assert type(small["attention"]) is nn.MultiheadAttention
    assert "no multiple of group_size" in quantize.summary(small).left["attention.q"]
    assert [edit["module"] for edit in surgery.structure(small)] == ["head"]
    x = randn(3, 2, 24)
    assert torch.equal(small["attention"](x, x, x)[0], model["attention"](x, x, x)[0])


INPUTS = {
    "transposed": lambda: randn(1, 64, 5).transpose(1, 2),
    "every other column": lambda: randn(4, 128)[:, ::2],
    "expanded": lambda: randn(1, 64).expand(4, 64),
    "one number": lambda: randn(4, 1).expand(4, 64),
    "empty": lambda: torch.empty(2, 0, 64),
    "one row": lambda: randn(64),
    "float64": lambda: randn(3, 64).double(),
    "bfloat16": lambda: randn(3, 64).bfloat16(),
    "many rows": lambda: randn(64, 200).t(),
    "needs a gradient": lambda: randn(3, 64).requires_grad_(),
}


@pytest.mark.parametrize("outputs", [96, 20])
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_every_input_gives_the_product(make, outputs: int):
    """Views of any strides, empty ones and every float dtype give `x W^T + b` in their own
    dtype.
    """
    layer, x = int4.Int4Linear.from_linear(linear(64, outputs), 32), make()
    y = layer(x)
    expected = x.detach().double() @ layer.dense_weight().double().t() + layer.bias.double()
    assert y.dtype == x.dtype
    helpers.assert_close(y, expected, dtype=torch.bfloat16)


def test_wrong_inputs_are_named():
    """Integers and other widths say what was given and what is taken."""
    layer = int4.Int4Linear.from_linear(linear(64, 32), 32)
    with pytest.raises(TypeError, match="int64"):
        layer(torch.ones(3, 64, dtype=torch.int64))
    with pytest.raises(ValueError, match="63, but the layer takes 64"):
        layer(randn(3, 63))


class TwoWays(nn.Module):
    """One linear is called, the other's weight is read, and a third isn't used."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.idle = linear(64, 64), linear(64, 64), linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.called(x), self.read.weight)


def test_layers_that_calibration_does_not_call_are_rounded_to_the_nearest():
    """They are named in the summary; the result is compared with the original; inputs that are not
    finite name their layer.
    """
    model, x = TwoWays().eval(), randn(64, 64)
    small = quantize_weights(model, calibration=[x])
    done = quantize.summary(small).done
    assert done["called"] == "int4" and all(
        "no batch reaches it" in done[name] for name in ("read", "idle")
    )
    with torch.no_grad():
        expected = (small(x) - model(x)).norm() / model(x).norm()
    assert quantize.summary(small).distance == pytest.approx(expected.item(), rel=1e-3)
    assert torch.equal(
        small.read.dense_weight(), int4.Int4Linear.from_linear(model.read, 32).dense_weight()
    )
    with pytest.raises(ValueError, match="layer 'called' inputs that are not finite"):
        quantize_weights(model, calibration=[x / 0])


def test_a_transposed_linear_is_converted():
    """GPT-2's Conv1D becomes 4-bit, and its weight still reads as [in, out]."""
    model, inputs = helpers.zoo("gpt2")
    small = quantize_weights(model)
    layer = small.transformer.h[0].mlp.c_fc
    assert isinstance(layer, int4.Int4Linear)
    assert layer.weight.shape == model.transformer.h[0].mlp.c_fc.weight.shape
    assert helpers.cosine(helpers.run(small, inputs), helpers.run(model, inputs)) > 0.97
