"""int8 as a transform of models."""

from __future__ import annotations

import copy
import re

import helpers
import pytest
import torch
from helpers import in_int8, linear, mlp, randn
from torch import nn

import quantize
from quantize import quantize_dynamic, surgery
from quantize.compression.int8 import speed
from quantize.nn import timing
from quantize.nn.int8 import Int8Linear


# The transform.
def rebuilt(model: nn.Module, fresh: nn.Module) -> nn.Module:
    """What a file does: apply the structure record to a fresh instance, then assign the tensors."""
    new = surgery.rebuild(fresh, surgery.structure(model))
    new.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    return new


# Deep, random and normalized at every layer: 8-bit weights alone, in float, give 0.987 and 0.994.
CLOSE = {"resnet": 0.98, "mobilenet_v2": 0.98}


@pytest.mark.parametrize("name", helpers.ZOO)
def test_zoo(name: str):
    """Each architecture keeps its outputs, leaves its input model alone, is rebuilt to the same
    bits.
    """
    model, inputs = helpers.zoo(name)
    before = copy.deepcopy(model.state_dict())
    expected = helpers.run(model, inputs)
    small = in_int8(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    actual = helpers.run(small, inputs)
    assert helpers.cosine(actual, expected) > CLOSE.get(name, 0.999)
    fresh, _ = helpers.zoo(name, seed=1)
    assert torch.equal(helpers.run(rebuilt(small, fresh), inputs), actual)
    left = [n for n, m in small.named_modules() if isinstance(m, nn.Linear)]
    assert not left
    (step,) = quantize.summary(small).steps
    assert set(step.done.values()) == {"int8"}
    known = ("embedding", "too few for an int8 product")
    assert all(any(part in why.lower() for part in known) for why in step.left.values())


def test_tied_head_and_table_share_one_int8_weight():
    """GPT-2's table and head stay tied, and the model is smaller by the factor of its dtype."""
    model, _ = helpers.zoo("gpt2")
    small = in_int8(model)
    assert small.lm_head.packed is small.transformer.wte.packed
    assert isinstance(small.transformer.wpe, nn.Embedding)


def test_skip_and_summary():
    """A skipped layer stays what it was, and the summary says why."""
    model = mlp(24, 40, 8)
    small = in_int8(model, skip=("2",))
    assert type(small[2]) is nn.Linear
    (step,) = quantize.summary(small).steps
    assert step.done == {"0": "int8"}
    assert list(step.left) == ["2"] and step.left["2"].startswith("named by skip")


def test_embeddings_are_an_option():
    """embeddings=True stores a table's rows in int8, each within half a step."""
    model = nn.Sequential(nn.Embedding(10, 16), linear(16, 4)).eval()
    assert type(in_int8(model)[0]) is nn.Embedding
    table = in_int8(model, embeddings=True)[0]
    ids = torch.tensor([[1, 2], [3, 9]])
    assert ((table(ids) - model[0](ids)).abs() <= 0.5001 * table.scale[ids, None]).all()


def test_what_cannot_be_quantized_is_named():
    """No linear, an already quantized model, weights that are not finite, and a skip that is no
    module.
    """
    with pytest.raises(ValueError, match="no layer left"):
        in_int8(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="already quantized"):
        in_int8(in_int8(mlp(24, 40, 8)))
    bad = mlp(24, 40, 8)
    with torch.no_grad():
        bad[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="'2' has a weight that is not finite"):
        in_int8(bad)
    with pytest.raises(ValueError, match="head"):
        in_int8(mlp(24, 40, 8), skip=("head",))
    with pytest.raises(TypeError, match=r"nn\.Module"):
        in_int8([1])


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
    small = in_int8(model)
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

    small = in_int8(nn.Sequential(Scaled(4, 4), Renamed(4, 4)).eval())
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
    small = in_int8(model)
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
    small = in_int8(model, calibration=[randn(64, 32), randn(64, 32, seed=1)])
    plain = in_int8(model)
    (step,) = quantize.summary(small).steps
    assert step.settings["smoothed"] == ["norm"]
    assert "smoothed" not in quantize.summary(plain).steps[0].settings
    with torch.no_grad():
        error, plain_error = ((m(x) - model(x)).square().mean() for m in (small, plain))
        assert error < 0.5 * plain_error
        assert torch.equal(rebuilt(small, Residual().eval())(x), small(x))
    with pytest.raises(ValueError, match="empty"):
        in_int8(model, calibration=[])


def timings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Let int8 cost 9 us more than float and 4 times less per weight; returns the shapes that are
    timed.
    """
    shapes = []

    def timed(
        plain: nn.Module, make_small: object, x: torch.Tensor, *, kind: object
    ) -> timing.Timing:
        numbers = plain.weight.numel()
        shapes.append(tuple(x.shape))
        return timing.Timing(tuple(x.shape), numbers * 1e-9 + 1e-6, numbers / 4e9 + 1e-5)

    monkeypatch.setattr(speed, "time_layers", timed)
    return shapes


def test_slower_layers_stay_in_float(monkeypatch: pytest.MonkeyPatch):
    """By default a layer that the stopwatch finds slower in int8 stays, with both times, and what
    shares its weight stays too; prefer="size" converts it.
    """
    shapes = timings(monkeypatch)
    model = nn.Sequential(linear(4, 4), linear(4, 512), linear(512, 512)).eval()
    (step,) = quantize.summary(quantize_dynamic(model)).steps
    slow = "int8 is slower here: 10.0 us against 1.0 for 1 x 4"
    assert step.left["0"].startswith(slow) and step.done == {"2": "int8"}
    assert shapes[:3] == [(1, 4), (16, 4), (256, 4)]
    assert len(quantize.summary(in_int8(model)).done) == 3
    tied = nn.Sequential(nn.Embedding(8, 4), linear(4, 8, bias=False), linear(8, 9000)).eval()
    tied[0].weight = tied[1].weight
    left = quantize.summary(quantize_dynamic(tied)).left
    assert "slower" in left["1"] and "shares its weight with 1" in left["0"]


def test_rows_come_from_calibration(monkeypatch: pytest.MonkeyPatch):
    """A layer is timed at the fewest, the middle and the most rows that calibration gives it."""
    shapes = timings(monkeypatch)
    model = nn.Sequential(linear(4, 4), linear(4, 9000)).eval()
    quantize_dynamic(model, calibration=[randn(n, 2, 4) for n in (1, 2, 3, 9, 5)])
    assert shapes[:3] == [(2, 4), (6, 4), (18, 4)]


def test_a_model_that_int8_slows_down_everywhere(monkeypatch: pytest.MonkeyPatch):
    """It comes back as a float copy, with a warning and a summary that say so."""
    timings(monkeypatch)
    model, x = mlp(24, 40, 8), randn(5, 24)
    with pytest.warns(UserWarning, match=r"no layer of Sequential is faster in int8 .*'size'"):
        same = quantize_dynamic(model)
    assert same is not model and torch.equal(same(x), model(x))
    (step,) = quantize.summary(same).steps
    assert not step.done and set(step.left) == {"0", "2"}
    with pytest.raises(ValueError, match="prefer must be"):
        quantize_dynamic(model, prefer="fast")


def test_the_output_stays_within_an_error():
    """The layers that cost most go back to float, and no more of them than it takes."""
    model, x = nn.Sequential(*(linear(24, 24, seed=i) for i in range(4))).eval(), randn(64, 24)
    with torch.no_grad():
        model[2].weight[:, 3] *= 300  # the other inputs of this layer lose their bits
        model[1].weight[3] /= 300
    given = {"calibration": [x]}
    whole = quantize.summary(in_int8(model, **given))
    limit = 0.7 * whole.distance
    small = in_int8(model, max_error=limit, **given)
    (step,) = quantize.summary(small).steps
    assert step.settings["max_error"] == limit
    assert 0 < step.distance <= limit
    assert step.done and step.left
    reason = next(iter(step.left.values()))
    assert re.match(r"in int8 it alone changes the output by 0\.\d+; max_error is 0\.", reason)
    error = quantize.calibration.distance(small, model, [x])
    assert error == pytest.approx(step.distance, rel=1e-4)
    kept = quantize.summary(in_int8(model, max_error=2 * whole.distance, **given))
    assert len(kept.done) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_error": 0.1}, "max_error=0.1 needs calibration"),
        ({"max_error": 0, "calibration": [randn(2, 24)]}, "above 0, got 0"),
        ({"max_error": float("nan"), "calibration": [randn(2, 24)]}, "above 0, got nan"),
        ({"max_error": 1e-7, "calibration": [randn(2, 24)]}, "the layer that costs least, '.'"),
    ],
)
def test_errors_that_cannot_be_kept_are_refused(options: dict, message: str):
    """By name, with the numbers."""
    with pytest.raises(ValueError, match=message):
        in_int8(mlp(24, 40, 8), **options)


def test_what_is_not_a_linear_layer_is_reported():
    """Layers that have no form in int8 are named in the summary, not passed over in silence."""
    layers = {"conv": nn.ConvTranspose2d(1, 4, 3), "rnn": nn.RNN(4, 4), "head": linear(4, 4)}
    (step,) = quantize.summary(in_int8(nn.ModuleDict(layers))).steps
    assert step.done == {"head": "int8"}
    assert "ConvTranspose2d" in step.left["conv"] and "RNN" in step.left["rnn"]


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
        in_int8(model, calibration=[batch])


def test_what_stays_float_is_said_with_its_size():
    """A convolutional network is refused with its bytes; a model whose table is most of the file
    warns and says the share.
    """
    with pytest.raises(ValueError, match=r"1296 of its 1296 bytes stay float \(0: a ConvTr"):
        up = nn.ConvTranspose2d(4, 8, 3, bias=False)
        in_int8(nn.Sequential(up, nn.ConvTranspose2d(8, 4, 1), nn.Flatten()))
    model = nn.Sequential(nn.Embedding(100, 24), linear(24, 24, bias=False))
    with pytest.warns(
        UserWarning, match=r"int8: 93% of 10272 bytes stay in floating point \(0: an embedding"
    ):
        small = in_int8(model)
    noted = quantize.summary(small)
    assert noted.steps[-1].settings["stays_float"] == "93% of 10272 bytes"
    assert "93% of the bytes" in noted.left["0"]


def test_calibration_measures_the_distance():
    """With batches at hand the summary has the relative distance of the outputs that anybody finds
    on them.
    """
    model, x = mlp(24, 40, 8), randn(16, 24)
    small = in_int8(model, calibration=[x])
    with torch.no_grad():
        expected = ((small(x) - model(x)).double().norm() / model(x).double().norm()).item()
    assert quantize.summary(small).distance == pytest.approx(expected, rel=1e-4)
