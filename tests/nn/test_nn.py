"""A compressed layer as others see it: its weight reads as the float weight that it stands for,
whoever asks.
"""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import helpers
import pytest
import torch
from helpers import in_int8, randn
from torch import Tensor, nn
from torch.nn import functional as F

import quantize
from quantize.compression.int4 import quantize_weights
from quantize.nn import WeightReading

FILES = Path(__file__).with_name("files")


class Net(nn.Module):
    """Two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, 96), nn.Linear(96, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


def net(kind: type[nn.Module] = Net) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval()


def low_rank(model: nn.Module) -> nn.Module:
    return quantize.factorize_low_rank(model, ratio=0.5)


TRANSFORMS = {
    "int8": in_int8,
    "int4": quantize_weights,
    "low rank": low_rank,
    "low rank int8": lambda m: in_int8(low_rank(m)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weight_reads_as_what_the_layer_multiplies_by(transform, dtype):
    """dtype, shape and numbers: a product with `layer.weight` is the layer's output, up to its
    rounding of activations.
    """
    model = transform(net().to(dtype))
    x = randn(5, 64).to(dtype)
    weight = model.body.weight
    assert isinstance(weight, Tensor)
    assert (weight.dtype, weight.shape, weight.device.type) == (dtype, (96, 64), "cpu")
    assert (
        weight.is_floating_point()
        and weight.size(0) == 96
        and len(weight) == 96
        and weight.numel() == 96 * 64
    )
    with torch.no_grad():
        expected = F.linear(x.float(), model.body.dense_weight().float(), model.body.bias.float())
        error = (model.body(x).float() - expected).norm() / expected.norm()
        read = F.linear(x, weight, model.body.bias)
        assert error < 0.02
        assert read.dtype == dtype
        helpers.assert_close(
            read.float(),
            expected,
            dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
        )
    assert next(model.parameters()).dtype == dtype


def test_a_model_of_compressed_layers_only_has_a_floating_parameter():
    """`next(model.parameters())` tells dtype and device, and follows `.to`; it is no element of the
    state and none to train.
    """
    for transform in (in_int8, quantize_weights):
        model = transform(nn.Sequential(nn.Linear(32, 32, bias=False)))
        assert next(model.parameters()).dtype == torch.float32
        assert next(model.to(torch.bfloat16).parameters()).dtype == torch.bfloat16
        assert model[0].weight.dtype == torch.bfloat16
        assert sum(p.numel() for p in model.parameters()) == 0
        assert not any("like" in name for name in model.state_dict())
        again = copy.deepcopy(model)
        assert not again.load_state_dict(model.state_dict()).missing_keys


READS = {
    "cosine head": lambda w, x: F.linear(F.normalize(x), F.normalize(w)),
    "cast to its dtype": lambda w, x: x.to(w.dtype) @ w.t().to(x.dtype),
    "as the left operand": lambda w, x: (w @ x.t()).t(),
    "stacked": lambda w, x: torch.einsum("bk,enk->ben", x, torch.stack([w, w])).sum(1),
    "rows": lambda w, x: torch.stack([F.linear(x, row[None])[:, 0] for row in w[:3]]),
    "data": lambda w, x: F.linear(x, w.data + 0),
    "a deep copy": lambda w, x: F.linear(x, copy.deepcopy(w)),
    "a pickle": lambda w, x: F.linear(x, pickle.loads(pickle.dumps(w))),
    "out": lambda w, x: torch.mm(x, w.t(), out=torch.empty(x.shape[0], w.shape[0])),
    "added to something": lambda w, x: torch.zeros(w.shape).add_(w) @ x.t(),
    "chunks": lambda w, x: torch.cat([F.linear(x, part) for part in w.chunk(3)], -1),
    "numpy": lambda w, x: torch.from_numpy(w.numpy() * 1),
    "printed": lambda w, x: torch.tensor(len(repr(w))),
    "factory": lambda w, x: torch.zeros_like(w) + w.new_zeros(()) + w.new_tensor(1.0),
    "embedding": lambda w, x: F.embedding(torch.arange(4), w),
    "norm": lambda w, x: torch.linalg.norm(w) + w.abs().max().item() + float(w[0, 0]),
}


@pytest.mark.parametrize("transform", [*TRANSFORMS.values()][:4], ids=[*TRANSFORMS][:4])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_every_way_of_reading_gives_what_the_float_weight_gives(transform, read):
    """Functions, methods, views, copies and files of a weight see the dense one."""
    layer, x = transform(net()).body, randn(5, 64)
    with torch.no_grad():
        expected = read(layer.dense_weight().clone(), x)
        actual = read(layer.weight, x)
    assert torch.equal(actual, expected)


def _assign(layer: nn.Module) -> None:
    layer.weight = torch.zeros(96, 64)


def _data(layer: nn.Module) -> None:
    layer.weight.data = torch.zeros(96, 64)


def _item(layer: nn.Module) -> None:
    layer.weight[0] = 0


def _increment(layer: nn.Module) -> None:
    weight = layer.weight
    weight += 1


WRITES = {
    "method": lambda layer: layer.weight.mul_(2),
    "of its data": lambda layer: layer.weight.data.mul_(2),
    "detached": lambda layer: layer.weight.detach().zero_(),
    "of a row": lambda layer: layer.weight[0].zero_(),
    "of a view of a view": lambda layer: layer.weight.t()[:3].fill_(1),
    "item": _item,
    "data": _data,
    "increment": _increment,
    "assignment": _assign,
    "init": lambda layer: nn.init.normal_(layer.weight),
    "out": lambda layer: torch.add(torch.ones(96, 64), 1, out=layer.weight),
    "copy": lambda layer: layer.weight.copy_(torch.zeros(96, 64)),
    "foreach": lambda layer: torch._foreach_mul_([layer.weight], 2.0),
    "in C++": lambda layer: torch.ops.aten.zero_(layer.weight),
    "requires_grad": lambda layer: layer.weight.requires_grad_(not layer.weight.requires_grad),
    "new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(96, 64))),
    "as a parameter": lambda layer: setattr(nn.Linear(64, 96), "weight", layer.weight),
}


@pytest.mark.parametrize("transform", [*TRANSFORMS.values()][:3], ids=[*TRANSFORMS][:3])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writing_to_a_weight_is_refused(transform, write):
    """Nothing that would be lost goes without an error, and the layer stays as it was."""
    layer = transform(net()).body
    before = layer.dense_weight().detach().clone()
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)), torch.no_grad():
        write(layer)
    assert torch.equal(layer.dense_weight(), before)


def test_a_low_rank_weight_trains_through_its_reading():
    """Gradients of a product with `layer.weight` reach both factors, as those of the layer do."""
    layer, x = low_rank(net()).body, randn(5, 64)
    assert layer.trainable
    wanted = torch.autograd.grad(layer(x).sum(), [layer.first.weight, layer.second.weight])
    found = torch.autograd.grad(
        F.linear(x, layer.weight, layer.bias).sum(), [layer.first.weight, layer.second.weight]
    )
    for a, b in zip(found, wanted, strict=True):
        helpers.assert_close(a, b)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(transform, default, tmp_path):
    """Made, saved, loaded and run under another default dtype, a model gives the same bits, for few
    rows and for many.
    """
    model, inputs = net(), (randn(3, 64), randn(3000, 64))
    expected = [transform(model)(x) for x in inputs]
    torch.set_default_dtype(default)
    try:
        small = transform(model)
        quantize.save(small, tmp_path / "small.pth")
        loaded = quantize.load(tmp_path / "small.pth", model=model)
        actual = [small(x) for x in inputs], [loaded(x) for x in inputs]
    finally:
        torch.set_default_dtype(torch.float32)
    for outputs in actual:
        assert all(
            a.dtype == e.dtype and torch.equal(a, e) for a, e in zip(outputs, expected, strict=True)
        )
    assert loaded.body.weight.dtype == torch.float32


class Reader(nn.Module):
    """Reads its layers' weights in the ways that models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up = nn.Embedding(50, 64), nn.Linear(64, 64)
        self.experts = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).to(next(self.parameters()).dtype)
        x = self.up(x.to(self.up.weight.dtype))
        mixed = torch.einsum(
            "btk,enk->bten", x, torch.stack([e.weight for e in self.experts])
        ).mean(2)
        return F.linear(F.normalize(mixed, dim=-1), F.normalize(self.embedding.weight, dim=-1))


@pytest.mark.parametrize(
    "transform",
    [
        in_int8,
        lambda m: in_int8(m, embeddings=True),
        quantize_weights,
        low_rank,
        quantize.to_half,
        lambda m: quantize.to_half(m, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("how", ["eager", "traced", "exported", "compiled"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_models_that_read_weights(transform, how):
    """Eager, traced, exported and compiled, a model that reads its layers' weights gives what dense
    weights give.
    """
    model, ids = net(Reader), torch.arange(10).reshape(2, 5)
    small = transform(model)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in dense.named_modules():
            if isinstance(getattr(layer, "weight", None), Tensor):
                layer.weight.copy_(small.get_submodule(name).weight)
        expected = dense(ids)
        if how == "traced":
            small = torch.jit.trace(small, (ids,), check_trace=False)
        elif how == "exported":
            small = torch.export.export(small, (ids,)).module()
        elif how == "compiled":
            small = torch.compile(small, backend="eager", fullgraph=True)
        actual = small(ids)
    assert ((actual - expected).norm() / expected.norm()) < 0.02


class Old(nn.Module):
    """What `files/version_1.safetensors` holds: a tied head, an attention, a low-rank pair and a
    4-bit linear.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 32)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.pair = nn.Linear(32, 32, bias=False)
        self.last = nn.Linear(32, 4)
        self.head = nn.Linear(32, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(ids)
        y = x[..., :8]
        x = torch.cat((y + self.attention(y, y, y)[0], x[..., 8:]), -1)
        x = x + self.pair(x)
        return self.last(x), self.head(x)


def test_a_file_of_version_1_is_still_read():
    """A file from before the packed weights had a name of their own gives the numbers that its
    writer noted in it.
    """
    path = FILES / "version_1.safetensors"
    model, noted = quantize.load(path, model=Old()), quantize.read_metadata(path)
    with torch.no_grad():
        last, head = model(torch.arange(6).reshape(1, 6) * 2 % 12)
    helpers.assert_close(last.flatten()[:8], torch.tensor(noted["last"]), dtype=torch.bfloat16)
    helpers.assert_close(head.flatten()[:8], torch.tensor(noted["head"]), dtype=torch.bfloat16)
    assert model.head.packed is model.embedding.packed


def test_readings_are_saved_as_plain_tensors():
    """`torch.save` of a weight writes the numbers, which any torch reads."""
    weight = in_int8(net()).body.weight
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    assert type(weight) is WeightReading and type(read) is Tensor
    assert torch.equal(read, weight)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_of_int8_rows(mode: str):
    """Bags of a table, with padding and an empty one, within half a step of each number; a file of
    it answers the same.
    """
    plain = nn.EmbeddingBag(50, 24, mode=mode, padding_idx=3)
    ids, offsets = torch.tensor([4, 3, 7, 7, 3, 49]), torch.tensor([0, 2, 2, 5])
    small = in_int8(nn.Sequential(plain), embeddings=True)[0]
    with torch.no_grad():
        expected, actual = plain(ids, offsets), small(ids, offsets)
        assert (actual - expected).abs().max() <= 3 * plain.weight.abs().max() / 253
        assert torch.equal(small(ids[:0], offsets[:1] * 0), torch.zeros(1, 24))
    if mode == "sum":
        scaled = small(ids, offsets, torch.full((6,), 2.0))
        assert torch.allclose(scaled, 2 * actual)


def test_large_tables_become_int8_by_themselves():
    """From 1048576 numbers on, or 65536 where they are a tenth of a model; others are named with
    their size.
    """
    for rows, outputs, large in ((8192, 32, True), (512, 4096, True), (512, 5120, False)):
        model = nn.Sequential(nn.Embedding(rows, 128), nn.Linear(128, outputs))
        assert ("0" in quantize.summary(in_int8(model)).done) == large
        left = quantize.summary(in_int8(model, embeddings=False)).left
        assert f"an embedding of {128 * rows} numbers" in left["0"]
