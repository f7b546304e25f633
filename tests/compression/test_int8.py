"""What int8 models compute: outputs beside those of the float model, tied weights, files."""

from __future__ import annotations

import copy

import helpers
import pytest
import torch
from helpers import in_int8, linear, mlp, randn
from rounded_twins import rounded_twin
from torch import nn

import quantize
from quantize import surgery


def rebuilt(model: nn.Module, fresh: nn.Module) -> nn.Module:
    """What a file does: apply the structure record to a fresh instance, then assign the tensors."""
    new = surgery.rebuild(fresh, surgery.structure(model))
    new.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    return new


# Deep, random and normalized at every layer: 8-bit weights alone, in float, give 0.987 and 0.994.
# What these must compute is their rounded twin, to the bit.
CLOSE = {"resnet": 0.98, "mobilenet_v2": 0.98}


@pytest.mark.parametrize("name", helpers.ZOO)
def test_zoo(name: str):
    """Each architecture computes what its layers define, close to its float outputs, leaves its
    input model alone, is rebuilt to the same bits.
    """
    model, inputs = helpers.zoo(name)
    before = copy.deepcopy(model.state_dict())
    expected = helpers.run(model, inputs)
    small = in_int8(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    actual = helpers.run(small, inputs)
    assert torch.equal(actual, helpers.run(rounded_twin(small), inputs))
    assert helpers.cosine(actual, expected) > CLOSE.get(name, 0.999)
    fresh, _ = helpers.zoo(name, seed=1)
    assert torch.equal(helpers.run(rebuilt(small, fresh), inputs), actual)
    left = [n for n, m in small.named_modules() if isinstance(m, nn.Linear)]
    assert not left
    (step,) = quantize.summary(small).steps
    assert {what for what in step.done.values() if "folded into" not in what} == {"int8"}
    known = ("embedding", "too few for an int8 product")
    assert all(any(part in why.lower() for part in known) for why in step.left.values())


def test_tied_head_and_table_share_one_int8_weight():
    """GPT-2's table and head stay tied, and the model is smaller by the factor of its dtype."""
    model, _ = helpers.zoo("gpt2")
    small = in_int8(model)
    assert small.lm_head.packed is small.transformer.wte.packed
    assert isinstance(small.transformer.wpe, nn.Embedding)


def test_embeddings_are_an_option():
    """embeddings=True stores a table's rows in int8, each within half a step."""
    model = nn.Sequential(nn.Embedding(10, 16), linear(16, 4)).eval()
    assert type(in_int8(model)[0]) is nn.Embedding
    table = in_int8(model, embeddings=True)[0]
    ids = torch.tensor([[1, 2], [3, 9]])
    assert ((table(ids) - model[0](ids)).abs() <= 0.5001 * table.scale[ids, None]).all()


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


def test_calibration_measures_the_distance():
    """With batches at hand the summary has the relative distance of the outputs that anybody finds
    on them.
    """
    model, x = mlp(24, 40, 8), randn(16, 24)
    small = in_int8(model, calibration=[x])
    with torch.no_grad():
        expected = ((small(x) - model(x)).double().norm() / model(x).double().norm()).item()
    assert quantize.summary(small).distance == pytest.approx(expected, rel=1e-4)
