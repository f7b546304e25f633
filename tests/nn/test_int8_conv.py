"""Int8Conv against the float layers, and against the same arithmetic in stock operations, bit for
bit; BatchNorm folded into it.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import in_int8, randn
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import quantize
from quantize import calibration, surgery
from quantize.nn import int8_images as images
from quantize.nn import int8_kernels as kernels
from quantize.nn.int8_conv import Int8Conv

LAYERS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "one pixel": (nn.Conv2d, {"kernel_size": 1}),
    "plain": (nn.Conv2d, {"kernel_size": 3, "padding": 1}),
    "stride": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "bias": False}),
    "dilation, same size": (nn.Conv2d, {"kernel_size": 3, "dilation": 2, "padding": "same"}),
    "groups": (nn.Conv2d, {"kernel_size": 3, "groups": 3}),
    "two outputs of each channel": (nn.Conv2d, {"kernel_size": 5, "groups": 33, "padding": 2}),
    "depthwise": (nn.Conv2d, {"kernel_size": 5, "groups": 33, "padding": 2, "out_channels": 33}),
    "depthwise, stride": (
        nn.Conv2d,
        {"kernel_size": 3, "groups": 33, "padding": 1, "out_channels": 33, "stride": (2, 3)},
    ),
    "depthwise sound": (nn.Conv1d, {"kernel_size": 3, "groups": 33, "out_channels": 33}),
    "reflected": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    "sound": (nn.Conv1d, {"kernel_size": 5, "stride": 2, "padding": 2}),
    "circular sound": (nn.Conv1d, {"kernel_size": 4, "padding": 3, "padding_mode": "circular"}),
    "volume": (nn.Conv3d, {"kernel_size": 2, "padding": (1, 0, 1)}),
}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def layer(name: str) -> Any:
    kind, options = LAYERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(33, **{"out_channels": 66, **options}).eval()


def image(plain: nn.Module, batch: int = 2) -> Tensor:
    return randn(batch, 33, *(9, 7, 5)[: len(plain.kernel_size)])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels last"])
@torch.no_grad()
def test_close_to_the_float_layer(name: str, last: bool):
    """Close to the float layer, in its memory format, and the bits of stock operations."""
    plain = layer(name)
    new, x = Int8Conv.from_layer(plain), image(plain)
    if last:
        x = x.contiguous(memory_format=FORMATS.get(x.dim(), torch.contiguous_format))
    expected, actual = plain(x), new(x)
    assert actual.stride() == expected.stride() and actual.dtype == expected.dtype
    assert (actual - expected).norm() <= 0.02 * expected.norm()
    with kernels.kernel("reference"):
        stock = new(x)
    assert torch.equal(stock, actual) and stock.stride() == actual.stride()
    assert torch.equal(new(x[1]), actual[1])  # a sample alone, and without a batch


def test_one_sided_and_constant_inputs():
    """Inputs far from 0, a constant channel, and a sample of zeros."""
    plain = layer("plain")
    x = image(plain, 3).abs() + 5
    x[:, 0], x[2] = 7, 0
    with torch.no_grad():
        expected, actual = plain(x), Int8Conv.from_layer(plain)(x)
    assert (actual - expected).norm() <= 0.02 * expected.norm()
    assert torch.allclose(actual[2], expected[2], atol=1e-6)


def test_a_sample_that_is_not_finite():
    """It reaches no other sample, and its outputs are not finite."""
    new = Int8Conv.from_layer(layer("plain"))
    x = image(new, 3)
    with torch.no_grad():
        clean = new(x)
        x[1, 4, 3, 3] = float("inf")
        found = new(x)
    assert torch.equal(found[[0, 2]], clean[[0, 2]]) and found[1].isnan().all()


def test_empty_batch_and_refusals():
    new = Int8Conv.from_layer(layer("plain"))
    assert new(torch.empty(0, 33, 5, 5)).shape == (0, 66, 5, 5)
    with pytest.raises(ValueError, match=r"must be \[N, 33, ...\]"):
        new(randn(2, 32, 5, 5))
    with pytest.raises(ValueError, match="smaller than the kernel"):
        Int8Conv.from_layer(layer("stride"))(randn(2, 33, 2, 2))


def test_padding_beyond_all_memory_is_refused():
    """Sizes that a file may claim don't overflow in the kernel."""
    huge = nn.Conv2d(4, 4, 3, stride=1 << 30, padding=1 << 30)
    with pytest.raises(MemoryError, match="no memory"):
        Int8Conv.from_layer(huge)(randn(1, 4, 5, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype):
    plain = layer("plain")
    x = image(plain)
    with torch.no_grad():
        expected = plain(x)
        actual = Int8Conv.from_layer(plain.to(dtype))(x.to(dtype))
    assert actual.dtype == dtype
    assert (actual.float() - expected).norm() <= 0.02 * expected.norm()


def test_relu():
    """Negative outputs become 0, the others stay."""
    plain = layer("plain")
    both = [Int8Conv.from_layer(plain, relu=relu)(image(plain)) for relu in (False, True)]
    assert torch.equal(both[0].relu(), both[1])


def test_weight_reads_as_the_float_weight():
    plain = layer("groups")
    new = Int8Conv.from_layer(plain)
    assert new.weight.shape == plain.weight.shape
    assert (new.weight - plain.weight).abs().max() <= plain.weight.abs().max() / 253


# ------------------------------------------------------------------------------------------------
# in models


class Net(nn.Module):
    """Convolutions with BatchNorm behind them, in a Sequential and by name; one is read twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
        self.deep, self.norm = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.wide, self.other = nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))

    def body(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.norm(self.deep(x)).relu()
        between = self.wide(x)
        return self.other(between) + between


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().train()
        for _ in range(4):
            model(3 + 2 * torch.randn(8, 3, 8, 8))
        return model.eval()


NAMES = ("stem.0", "deep", "wide")
FOLLOWERS = {"stem.0": "stem.1", "deep": "norm"}


def observed(model: nn.Module) -> dict[str, str]:
    layers = {name: model.get_submodule(name) for name in NAMES}
    return calibration.followers(model, [randn(2, 3, 8, 8), randn(1, 3, 9, 9)], layers)


def test_who_reads_an_output(net: nn.Module):
    """By following the forward, and by watching calls; `wide` is read by a sum too."""
    assert surgery.traced_followers(net, NAMES) == FOLLOWERS == observed(net)


def test_batch_norm_is_folded(net: nn.Module):
    """The folded float model answers as before."""
    folded = surgery.clone(net)
    assert surgery.fold_norms(folded, FOLLOWERS) == FOLLOWERS
    x = randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(folded(x), net(x), atol=1e-5)
    for given in (None, [x]):
        done = quantize.summary(in_int8(net, calibration=given)).done
        assert done["norm"] == "folded into deep" and done["wide"] == "int8" and "other" not in done


def test_norms_that_are_not_folded(net: nn.Module):
    """One in training mode, and one whose convolution is watched by a hook."""
    model = surgery.clone(net)
    model.norm.train()
    model.stem[0].register_forward_hook(lambda *_: None)
    assert surgery.fold_norms(model, FOLLOWERS) == {}


@torch.no_grad()
def test_activations_are_folded(tmp_path):
    """Modules that alone read a convolution or its norm, with the same answers; through a file."""

    def make() -> nn.Module:
        first, second = nn.Conv2d(4, 32, 3), nn.Conv2d(32, 32, 3)
        smooth = nn.Conv2d(32, 16, 1), nn.SiLU()
        return nn.Sequential(first, nn.BatchNorm2d(32), nn.ReLU(), second, nn.ReLU(True), *smooth)

    plain, x = make().eval(), randn(2, 4, 8, 8)
    watched = copy.deepcopy(plain)
    watched[2].register_forward_hook(lambda *_: None)
    small, other = (in_int8(model, calibration=[x]) for model in (plain, watched))
    assert small[0].relu and small[3].relu and not other[0].relu and other[3].relu
    assert quantize.summary(small).done["2"] == "folded into 0" and small[5].activation == "silu"
    assert (small(x) - plain(x)).norm() <= 0.03 * plain(x).norm()
    quantize.save(small, tmp_path / "model.pth")
    assert torch.equal(small(x), other(x))
    assert torch.equal(quantize.load(tmp_path / "model.pth", model=make())(x), small(x))


class KeepsOutput(Net):
    """Keeps what lies between a convolution and its norm, and decides on a value."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.stem[0](x)
        x = self.stem[1](self.kept)
        if x.sum() > 0:
            x = x + 1
        return self.head(self.norm(self.deep(x)).mean((2, 3)))


def test_an_output_that_somebody_keeps():
    """It is seen; a forward that decides on values can't be followed, but watched."""
    model = KeepsOutput().eval()
    assert surgery.traced_followers(model, NAMES) == {}
    assert observed(model) == {"deep": "norm"}


def test_copies_and_files(net: nn.Module, tmp_path):
    """A deep copy, a pickle and both files answer with the same bits."""
    model, x = in_int8(net), randn(2, 3, 8, 8)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"model{suffix}"
        quantize.save(model, path)
        copies.append(quantize.load(path, model=Net()))
    with torch.no_grad():
        expected = model(x)
        assert all(torch.equal(one(x), expected) for one in copies)
        assert (expected - net(x)).norm() <= 0.03 * net(x).norm()


def test_size():
    """The file of a convolutional net is below 0.3 of the float one."""
    plain = nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3)).eval()
    sizes = [sum(t.nbytes for t in m.state_dict().values()) for m in (plain, in_int8(plain))]
    assert sizes[1] <= 0.3 * sizes[0]


def test_a_max_error_takes_convolutions_back(net: nn.Module):
    """A layer that goes back to float keeps the norm that was folded into it."""
    batches = [randn(2, 3, 8, 8)]
    model = in_int8(net, calibration=batches, max_error=0.003)
    assert quantize.summary(model).distance <= 0.003
    assert any(isinstance(m, nn.Conv2d) for m in model.modules())


@pytest.mark.slow
def test_compiled(net: nn.Module):
    """torch.compile keeps a convolution as one operator in its graph, with the same bits."""
    model, x = in_int8(net), randn(2, 3, 8, 8)
    with torch.no_grad():
        compiled = torch.compile(model.body, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), model.body(x))


# ------------------------------------------------------------------------------------------------
# native code


def test_every_instruction_set_and_thread_count(level: str, monkeypatch):
    """The bits of stock operations on the largest sums, on one thread and on three."""
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert images.is_exact.__wrapped__()


def test_a_computed_weight_is_timed_and_converted():
    """weight_norm as a parametrization, with the stopwatch on."""
    plain = nn.Sequential(parametrizations.weight_norm(nn.Conv1d(64, 64, 5))).eval()
    small, x = quantize.quantize_dynamic(plain), randn(1, 64, 40)
    with torch.no_grad():
        assert (small(x) - plain(x)).norm() <= 0.02 * plain(x).norm()
