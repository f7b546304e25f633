"""Low-rank pairs as layers: they compute their product, are saved, rebuilt, scripted, quantized."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from helpers import assert_close, cosine, in_int8, run, zoo
from low_rank_models import data, mlp, pairs_in
from torch import nn

import quantize
from quantize import surgery
from quantize.compression.low_rank import factorize_low_rank
from quantize.nn.int8 import Int8Linear
from quantize.nn.low_rank import LowRankConv1d, LowRankConv2d, LowRankLinear


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "resnet", "convnext"])
def test_structure_record_rebuilds_a_foreign_model(name):
    """A fresh model plus the record plus the tensors computes the same numbers."""
    model, inputs = zoo(name, shallow=True)
    small = factorize_low_rank(model, calibration=[inputs])
    fresh = surgery.rebuild(zoo(name, seed=1, shallow=True)[0], surgery.structure(small))
    fresh.load_state_dict(small.state_dict())
    assert_close(run(fresh, inputs), run(small, inputs))
    assert surgery.structure(fresh) == surgery.structure(small)


def test_record_of_a_resized_layer_survives():
    """A layer that was cut before it was factorized keeps both edits in the record, also after a
    second rebuild.
    """
    model = mlp(32, 48, 16)
    cut = surgery.clone(model)
    surgery.resize(
        cut[0],
        tensors={"weight": cut[0].weight[:40], "bias": cut[0].bias[:40]},
        attributes={"out_features": 40},
    )
    surgery.resize(
        cut[2], tensors={"weight": cut[2].weight[:, :40]}, attributes={"in_features": 40}
    )
    small = factorize_low_rank(cut)
    again = surgery.rebuild(mlp(32, 48, 16), surgery.structure(small))
    twice = surgery.rebuild(mlp(32, 48, 16), surgery.structure(again))
    again.load_state_dict(small.state_dict(), assign=True)
    assert surgery.structure(twice) == surgery.structure(small)
    assert_close(again(torch.ones(2, 32)), small(torch.ones(2, 32)))


def test_rebuild_needs_no_memory():
    """On the meta device the record gives empty layers of the right shapes."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 32), nn.Conv2d(8, 8, 3))
    small = factorize_low_rank(nn.Sequential(nn.Linear(64, 32), nn.Conv2d(8, 8, 3)))
    empty = surgery.rebuild(model, surgery.structure(small))
    assert all(p.device.type == "meta" for p in empty.parameters())
    assert [p.shape for p in empty.parameters()] == [p.shape for p in small.parameters()]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2},
        {"padding": 2, "padding_mode": "circular"},
    ],
)
@pytest.mark.parametrize("split", ["channel", "spatial"])
def test_a_conv_pair_computes_its_dense_weight(options, split):
    """Both splits equal the one convolution with the weight they read as, for every padding, stride
    and dilation.
    """
    conv = nn.Conv2d(6, 10, (3, 5), **options)
    pair = LowRankConv2d(conv, 4, split, bias=True)
    for p in pair.parameters():
        nn.init.normal_(p)
    conv.weight.data, conv.bias.data = pair.dense_weight(), pair.bias.data
    x = torch.randn(2, 6, 14, 13)
    assert_close(pair(x), conv(x))
    if split == "channel":
        sound = nn.Conv1d(6, 10, 5, **options)
        pair = LowRankConv1d(sound, 4, split, bias=True)
        for p in pair.parameters():
            nn.init.normal_(p)
        sound.weight.data, sound.bias.data = pair.dense_weight(), pair.bias.data
        assert_close(pair(x[..., 0]), sound(x[..., 0]))


def test_convolutions_of_sound_become_pairs(tmp_path):
    """Kernels of a low rank are found, behind each other and with more outputs than inputs; the
    result is saved and loaded, and one more step fits it.
    """
    torch.manual_seed(0)
    wide, narrow = nn.Conv1d(4, 48, 8, stride=2), nn.Conv1d(48, 16, 9, padding="same")
    for layer, rank in ((wide, 3), (narrow, 4)):
        kernel = torch.randn(layer.out_channels, rank) @ torch.randn(rank, layer.weight[0].numel())
        layer.weight.data = kernel.view_as(layer.weight) / 8
    model, batches = nn.Sequential(wide, nn.Tanh(), narrow), [torch.randn(4, 4, 100)] * 2
    small = factorize_low_rank(model, rank={"0": 3, "2": 4}, calibration=batches)
    assert [type(small[0]), type(small[2])] == [LowRankConv1d, LowRankConv1d]
    assert_close(small(batches[0]), model(batches[0]), factor=100)
    plain = factorize_low_rank(model, rank={"0": 3, "2": 4})
    assert_close(plain(batches[0]), model(batches[0]), factor=100)
    quantize.save(small, tmp_path / "pairs.safetensors")
    loaded = quantize.load(tmp_path / "pairs.safetensors", model=model)
    assert torch.equal(loaded(batches[0]), small(batches[0]))


def test_auto_split_finds_separable_kernels():
    """Kernels that are columns times rows go to the spatial split, which reproduces them; others to
    the channel split.
    """
    torch.manual_seed(0)
    separable, mixing = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
    separable.weight.data = (
        torch.einsum("mrb,rcd->mcdb", torch.randn(16, 8, 3), torch.randn(8, 16, 3)) / 8
    )
    mixing.weight.data = (
        torch.einsum("mr,rcde->mcde", torch.randn(16, 4), torch.randn(4, 16, 3, 3)) / 8
    )
    x = [torch.randn(4, 16, 12, 12) for _ in range(2)]
    small = factorize_low_rank(
        nn.Sequential(separable, mixing), ratio={"0": 0.5, "1": 0.3}, calibration=x
    )
    assert [layer.split for layer in small] == ["spatial", "channel"]
    assert_close(small(x[0]), mixing(separable(x[0])), factor=100)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "t5"])
def test_int8_works_inside_pairs(name):
    """Dynamic int8 turns both layers of each pair to int8 and changes little; sizes multiply."""
    model, inputs = zoo(name, shallow=True)
    small = factorize_low_rank(model, calibration=[inputs], only_faster=False)
    both = in_int8(small)
    assert all(
        isinstance(p.first, Int8Linear) and isinstance(p.second, Int8Linear)
        for p in linear_pairs(both)
    )
    assert cosine(run(both, inputs), run(small, inputs)) > 0.99


def linear_pairs(model: nn.Module) -> list[LowRankLinear]:
    return [m for m in pairs_in(model).values() if isinstance(m, LowRankLinear)]


@pytest.mark.parametrize("name", ["llama", "resnet", "gpt2"])
def test_save_and_load(name, tmp_path):
    """A file of either kind loaded into a fresh instance computes the same, for foreign models,
    int8 on top included.
    """
    model, inputs = zoo(name, shallow=True)
    small = factorize_low_rank(model, calibration=[inputs])
    for compressed, suffix in product((small, in_int8(small)), (".pth", ".safetensors")):
        quantize.save(compressed, tmp_path / f"model{suffix}")
        loaded = quantize.load(
            tmp_path / f"model{suffix}", model=zoo(name, seed=1, shallow=True)[0]
        )
        assert_close(run(loaded, inputs), run(compressed, inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    """The pairs have the model's dtype and give its outputs to its precision."""
    model = mlp(64, 64).to(dtype)
    model[0].weight.data = (torch.randn(64, 8) @ torch.randn(8, 64) / 8).to(dtype)
    x = [b.to(dtype) for b in data(64)]
    small = factorize_low_rank(model, rank=8, calibration=x)
    assert all(p.dtype == dtype for p in small.parameters())
    coarse = torch.float32 if dtype == torch.float64 else dtype
    assert_close(small(x[0]), model(x[0]), dtype=coarse, factor=10)


@pytest.mark.parametrize("scale", [1e-15, 1e12, 1e19])
def test_inputs_of_any_size(scale):
    """Squares outside the range of float32 don't spoil the result."""
    model = mlp(64, 64)
    model[0].weight.data = torch.randn(64, 8) @ torch.randn(8, 64) / 8
    x = [b * scale for b in data(64)]
    assert_close(factorize_low_rank(model, rank=8, calibration=x)(x[0]), model(x[0]), factor=10)


def test_fused_encoder_layers_still_work():
    """torch's TransformerEncoder, whose fast path reads weights, gives the same with and without
    it, attention untouched.
    """
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu")
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 7, 64)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    small = factorize_low_rank(model, calibration=[{"src": x}])
    fed_forward = [f"layers.{i}.linear{j}" for i, j in product((0, 1), (1, 2))]
    assert sorted(pairs_in(small)) == fed_forward
    assert "reads the weight" in quantize.summary(small).left["layers.0.self_attn.out_proj"]
    with torch.no_grad():
        fast = small(x, src_key_padding_mask=padding)
    slow = small(x, src_key_padding_mask=padding)
    assert_close(fast[0], slow[0], factor=10)
    assert_close(fast[1, :5], slow[1, :5], factor=10)


def test_weight_reads_as_the_product():
    """Code that reads `.weight` of a pair gets the dense weight's type and shape, and the product
    in torch functions.
    """
    small = factorize_low_rank(mlp(64, 48), rank=8)[0]
    assert small.weight.shape == (48, 64) and small.weight.dtype == torch.float32
    x = torch.randn(3, 64)
    assert_close(nn.functional.linear(x, small.weight, small.bias), small(x))


def test_pairs_script_trace_and_export():
    """A factorized model can be scripted, traced and exported."""
    small, x = factorize_low_rank(mlp(64, 64, 64), rank=8), torch.randn(2, 64)
    expected = small(x)
    assert_close(torch.jit.trace(small, x)(x), expected)
    assert_close(torch.export.export(small, (x,)).module()(x), expected)
