"""int8 as a transform of models."""

from __future__ import annotations

import copy

import helpers
import pytest
import torch
from helpers import linear, mlp, randn
from torch import nn

import quantize
from quantize import surgery
from quantize.compression import int8
from quantize.nn.int8 import Int8Linear


# The transform.
def rebuilt(model: nn.Module, fresh: nn.Module) -> nn.Module:
    """What a file does: apply the structure record to a fresh instance, then assign the tensors."""
    new = surgery.rebuild(fresh, surgery.structure(model))
    new.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    return new


@pytest.mark.parametrize("name", helpers.ZOO)
def test_zoo(name: str):
    """Each architecture keeps its outputs, leaves its input model alone, is rebuilt to the same
    bits.
    """
    model, inputs = helpers.zoo(name)
    before = copy.deepcopy(model.state_dict())
    expected = helpers.run(model, inputs)
    small = int8.quantize_dynamic(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    actual = helpers.run(small, inputs)
    assert helpers.cosine(actual, expected) > 0.999
    fresh, _ = helpers.zoo(name, seed=1)
    assert torch.equal(helpers.run(rebuilt(small, fresh), inputs), actual)
    left = [n for n, m in small.named_modules() if isinstance(m, nn.Linear)]
    assert not left
    (step,) = quantize.summary(small).steps
    assert set(step.done.values()) == {"int8"}
    assert all("embedding" in reason.lower() for reason in step.left.values())


def test_tied_head_and_table_share_one_int8_weight():
    """GPT-2's table and head stay tied, and the model is smaller by the factor of its dtype."""
    model, _ = helpers.zoo("gpt2")
    small = int8.quantize_dynamic(model)
    assert small.lm_head.packed is small.transformer.wte.packed
    assert isinstance(small.transformer.wpe, nn.Embedding)


def test_skip_and_summary():
    """A skipped layer stays what it was, and the summary says why."""
    model = mlp(24, 40, 8)
    small = int8.quantize_dynamic(model, skip=("2",))
    assert type(small[2]) is nn.Linear
    (step,) = quantize.summary(small).steps
    assert step.done == {"0": "int8"}
    assert list(step.left) == ["2"] and step.left["2"].startswith("named by skip")


def test_embeddings_are_an_option():
    """embeddings=True stores a table's rows in int8, each within half a step."""
    model = nn.Sequential(nn.Embedding(10, 16), linear(16, 4)).eval()
    assert type(int8.quantize_dynamic(model)[0]) is nn.Embedding
    table = int8.quantize_dynamic(model, embeddings=True)[0]
    ids = torch.tensor([[1, 2], [3, 9]])
    assert ((table(ids) - model[0](ids)).abs() <= 0.5001 * table.scale[ids, None]).all()


def test_what_cannot_be_quantized_is_named():
    """No linear, an already quantized model, weights that are not finite, and a skip that is no
    module.
    """
    with pytest.raises(ValueError, match="no linear layer left"):
        int8.quantize_dynamic(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="already quantized"):
        int8.quantize_dynamic(int8.quantize_dynamic(mlp(24, 40, 8)))
    bad = mlp(24, 40, 8)
    with torch.no_grad():
        bad[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="'2' has a weight that is not finite"):
        int8.quantize_dynamic(bad)
    with pytest.raises(ValueError, match="head"):
        int8.quantize_dynamic(mlp(24, 40, 8), skip=("head",))
    with pytest.raises(TypeError, match=r"nn\.Module"):
        int8.quantize_dynamic([1])


def attention_cases():
    """Self and cross attention, masks of both kinds and shapes, weights wanted or not, both
    layouts, other widths.
    """
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    yield "self", {}, (5, 5), {}
    yield (
        "float mask, no weights",
        {"batch_first": True},
        (5, 5),
        {"attn_mask": randn(5, 5), "need_weights": False},
    )
    yield "both masks", {}, (5, 5), {"attn_mask": causal, "key_padding_mask": padding}
    yield (
        "mask by head",
        {"bias": False},
        (5, 5),
        {"attn_mask": randn(8, 5, 5), "average_attn_weights": False},
    )
    yield "cross, other widths", {"kdim": 24, "vdim": 20}, (5, 7), {}


@pytest.mark.parametrize("case", list(attention_cases()), ids=lambda c: c[0])
def test_multihead_attention(case):
    """The int8 module follows nn.MultiheadAttention in outputs and weights, and is rebuilt from its
    record to the same bits.
    """
    _, options, (t, s), arguments = case
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, **options).eval()
    model = nn.ModuleDict({"attention": attention})
    shape = (
        (lambda n, width: (2, n, width))
        if options.get("batch_first")
        else (lambda n, width: (n, 2, width))
    )
    query = randn(*shape(t, 32))
    same = "kdim" not in options
    key = query if same else randn(*shape(s, options["kdim"]), seed=1)
    value = query if same else randn(*shape(s, options["vdim"]), seed=2)
    small = int8.quantize_dynamic(model)
    with torch.no_grad():
        expected, expected_weights = attention(query, key, value, **arguments)
        actual, weights = small["attention"](query, key, value, **arguments)
        fresh = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4, **options)}).eval()
        again, _ = rebuilt(small, fresh)["attention"](query, key, value, **arguments)
    assert helpers.cosine(actual, expected) > 0.999
    assert torch.equal(actual, again)
    if expected_weights is None:
        assert weights is None
    else:
        helpers.assert_close(weights, expected_weights, dtype=torch.bfloat16)


def test_subclasses_with_their_own_forward_are_left_alone():
    """Only layers that compute what nn.Linear computes are replaced."""

    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class Renamed(nn.Linear):
        pass

    small = int8.quantize_dynamic(nn.Sequential(Scaled(4, 4), Renamed(4, 4)).eval())
    assert type(small[0]) is Scaled and isinstance(small[1], Int8Linear)
    assert "forward of its own" in quantize.summary(small).left["0"]


def test_transformer_encoder_runs_without_its_fused_path():
    """PyTorch's own encoder, whose fused path reads float weights, gives its output with int8
    layers inside.
    """
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, mask = randn(2, 6, 32), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    small = int8.quantize_dynamic(model)
    with torch.no_grad():
        actual, expected = small(x, src_key_padding_mask=mask), model(x, src_key_padding_mask=mask)
        again = rebuilt(small, copy.deepcopy(model))(x, src_key_padding_mask=mask)
    assert helpers.cosine(actual[~mask], expected[~mask]) > 0.999
    assert torch.equal(again, actual)


class Residual(nn.Module):
    """Two linears behind a norm with a few loud channels, and a second norm that a residual
    connection also reads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(32), linear(32, 48), linear(32, 48, seed=1)
        self.norm2, self.c = nn.LayerNorm(48), linear(48, 48, seed=2)
        with torch.no_grad():
            self.norm.weight[:3] = 60.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        y = self.norm2(self.a(y) * self.b(y).sigmoid())
        return y + self.c(y)


def test_calibration_folds_outliers_where_that_is_exact():
    """SmoothQuant reduces the error on held-out inputs, leaves a norm alone whose output a residual
    reads, and is rebuilt.
    """
    model, x = Residual().eval(), randn(64, 32, seed=3)
    small = int8.quantize_dynamic(model, calibration=[randn(64, 32), randn(64, 32, seed=1)])
    plain = int8.quantize_dynamic(model)
    (step,) = quantize.summary(small).steps
    assert step.settings["smoothed"] == ["norm"]
    assert "smoothed" not in quantize.summary(plain).steps[0].settings
    with torch.no_grad():
        error, plain_error = ((m(x) - model(x)).square().mean() for m in (small, plain))
        assert error < 0.5 * plain_error
        assert torch.equal(rebuilt(small, Residual().eval())(x), small(x))
    with pytest.raises(ValueError, match="empty"):
        int8.quantize_dynamic(model, calibration=[])


def test_speed_can_be_preferred(monkeypatch: pytest.MonkeyPatch):
    """With prefer="speed" a layer that the stopwatch finds slower in int8 stays in float, and says
    so.
    """

    def microseconds(
        layer: nn.Module, x: torch.Tensor
    ) -> float:  # int8 costs 9 more, and 4 times less per weight
        numbers = layer.in_features * layer.out_features
        return numbers / 4000 + 10 if isinstance(layer, Int8Linear) else numbers / 1000 + 1

    monkeypatch.setattr(int8, "_microseconds", microseconds)
    model = nn.Sequential(linear(4, 4), linear(4, 512), linear(512, 512)).eval()
    small = int8.quantize_dynamic(model, prefer="speed")
    (step,) = quantize.summary(small).steps
    assert "slower" in step.left["0"] and step.done["2"] == "int8"
    with pytest.raises(ValueError, match="slower"):
        int8.quantize_dynamic(linear(4, 4), prefer="speed")
    with pytest.raises(ValueError, match="prefer must be"):
        int8.quantize_dynamic(model, prefer="fast")


def test_what_is_not_a_linear_layer_is_reported():
    """Convolutions and recurrent layers are named in the summary, not passed over in silence."""
    model = nn.ModuleDict({"conv": nn.Conv2d(1, 4, 3), "lstm": nn.LSTM(4, 4), "head": linear(4, 4)})
    (step,) = quantize.summary(int8.quantize_dynamic(model)).steps
    assert step.done == {"head": "int8"}
    assert "Conv2d" in step.left["conv"] and "LSTM" in step.left["lstm"]


class Overflow(nn.Module):
    """Makes infinities."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1e30 * 1e30


@pytest.mark.parametrize("place", ["input", "inside"])
def test_calibration_that_is_not_finite_is_refused(place: str):
    """NaN in a batch, or made inside the model, names the layer that gets it."""
    model = mlp(24, 40, 8)
    batch = randn(4, 24)
    if place == "input":
        batch[1, 3] = float("nan")
    else:
        model.insert(1, Overflow())
    with pytest.raises(
        ValueError, match=f"layer '{'0' if place == 'input' else '3'}' inputs that are not finite"
    ):
        int8.quantize_dynamic(model, calibration=[batch])


def test_what_stays_float_is_said_with_its_size():
    """A convolutional network is refused with its bytes; a model whose table is most of the file
    warns and says the share.
    """
    with pytest.raises(ValueError, match=r"1296 of its 1296 bytes stay float \(0: a Conv2d"):
        int8.quantize_dynamic(
            nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.Conv2d(8, 4, 1), nn.Flatten())
        )
    model = nn.Sequential(nn.Embedding(100, 24), linear(24, 24, bias=False))
    with pytest.warns(
        UserWarning, match=r"int8: 93% of 10272 bytes stay in floating point \(0: an embedding"
    ):
        small = int8.quantize_dynamic(model)
    noted = quantize.summary(small)
    assert noted.steps[-1].settings["stays_float"] == "93% of 10272 bytes"
    assert "93% of the bytes" in noted.left["0"]


def test_calibration_measures_the_distance():
    """With batches at hand the summary has the relative distance of the outputs that anybody finds
    on them.
    """
    model, x = mlp(24, 40, 8), randn(16, 24)
    small = int8.quantize_dynamic(model, calibration=[x])
    with torch.no_grad():
        expected = ((small(x) - model(x)).double().norm() / model(x).double().norm()).item()
    assert quantize.summary(small).distance == pytest.approx(expected, rel=1e-4)
