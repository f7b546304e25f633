"""Fusing leaves the model as it is, and keeps what compression made of it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from fusion_models import Image, fastest, in_integers, randomized
from helpers import assert_close, in_int8, randn
from torch import nn

import quantize
from quantize.calibration import relative_error
from quantize.nn.int8_conv import Int8Conv
from quantize.run.fusion import fold, fuse, fusing, integers, planning, torchscript

pytestmark = [
    pytest.mark.usefixtures("no_clock"),
    pytest.mark.filterwarnings(
        "error:.*torch.jit.*:FutureWarning", "error:.*torch.jit.*:DeprecationWarning"
    ),
]


# The model stays as it is; compressed models.
def test_model_and_random_state_are_untouched() -> None:
    """Fusing changes neither weights, flags, hooks nor torch's random state."""
    model, x = randomized(Image()), randn(2, 3, 16, 16)
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    flags = [p.requires_grad for p in model.parameters()]
    fuse(model, x)
    fold(model, x)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    assert flags == [p.requires_grad for p in model.parameters()] and not any(
        m.training for m in model.modules()
    )


def test_hooks_are_fused_too() -> None:
    """A forward hook that changes the output changes the fused output."""
    model = randomized(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model[0].register_forward_hook(lambda module, args, output: output * 3)
    x = randn(2, 4)
    assert_close(fuse(model, x)(x), model(x))


@pytest.mark.slow
def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    """A head tied to the embedding doesn't double the file."""
    config = quantize.DecoderConfig(vocab_size=512, width=64, layers=1, heads=2, tied_head=True)
    model, ids = randomized(quantize.DecoderLM(config)), torch.arange(24).reshape(2, 12)
    fuse(model, ids).save(tmp_path / "fused.pt")
    tensors = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (tmp_path / "fused.pt").stat().st_size < tensors + 60_000


def in_8_bits(x: torch.Tensor) -> torch.Tensor:
    """x rounded to 256 steps over the range of all its numbers, in float64."""
    low, high = x.amin().clamp_max(0).double(), x.amax().clamp_min(0).double()
    step = (high - low) / 255
    zero = (-low / step).round()
    return ((x.double() / step + zero + 0.5).floor() - zero) * step


# The second is made where a CPU's kernels for it are exact; see below for the others.
WAYS = pytest.mark.parametrize(
    "way", [planning.FLOATS, planning.INTEGERS][: 1 + integers.available()]
)


@pytest.mark.slow
@WAYS
@pytest.mark.parametrize("dims", [1, 2])
def test_an_int8_convolution_is_one_kernel(
    dims: int, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file multiplies images by the stored weight, the whole batch rounded to 8 bits or as it
    is, by a plain computation of that in float64; loaded, it gives the same bits, as small as
    before.
    """
    fastest(way, monkeypatch)
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    model = randomized(nn.Sequential(kind(64, 256, 3, padding=1), nn.ReLU()))
    x = randn(2, 64, *[12] * dims)
    int8 = in_int8(model)
    made = planning.plan(int8, x)
    assert made.way == way
    layer = next(m for m in int8.modules() if isinstance(m, Int8Conv))
    function = (torch.nn.functional.conv1d, torch.nn.functional.conv2d)[dims - 1]
    for images in (x, 3 * x.abs()):
        bias = layer.bias.double()
        seen = images.double() if way == planning.FLOATS else in_8_bits(images)
        expected = function(seen, layer.dense_weight().double(), bias, padding=1).relu()
        assert relative_error([made.fused(images)], [expected]) < 1e-5
    kernels = ("onednn.qconv_pointwise.tensor", "mkldnn._convolution_pointwise")
    found = [made.after[name] for name in kernels]
    assert found == ([1, 0] if way == planning.INTEGERS else [0, dims - 1])
    made.fused.save(tmp_path / "fused.pt")
    assert torch.equal(torchscript.load(str(tmp_path / "fused.pt"))(x), made.fused(x))
    assert (tmp_path / "fused.pt").stat().st_size < layer.packed.numel() + 60_000


def test_without_exact_kernels_convolutions_are_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    """On such a CPU a plan says that it has no int8 kernels, whichever is faster."""
    monkeypatch.setattr(integers, "available", lambda: False)
    fastest(planning.INTEGERS, monkeypatch)
    model = randomized(nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU()))
    made = planning.plan(in_int8(model), randn(2, 16, 6, 6))
    assert made.way == planning.FLOATS
    assert f"left out: {planning.INTEGERS}: this CPU has none that are exact" in made.notes


@pytest.mark.slow
def test_int8_heads_are_in_float_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Beside convolutions in float, which do the padding before them: stock products of bytes take
    longer still.
    """
    fastest(planning.FLOATS, monkeypatch)
    layers = (nn.Conv2d(32, 64, 3), nn.Flatten(), nn.Linear(64 * 36, 64), nn.GELU())
    model = randomized(nn.Sequential(nn.ZeroPad2d((0, 1, 1, 0)), *layers))
    int8, x = in_int8(model), randn(2, 32, 7, 7)
    made = planning.plan(int8, x)
    kernels = [f"mkldnn._{kind}_pointwise" for kind in ("convolution", "linear")]
    assert set(made.after) == {*kernels, "aten.flatten.using_ints"}
    around, conv, _, head, *_ = int8
    weights = conv.dense_weight(), head.dense_weight()
    rows = torch.nn.functional.conv2d(around(x), weights[0], conv.bias).flatten(1)
    expected = nn.functional.gelu(nn.functional.linear(rows, weights[1], head.bias))
    assert_close(made.fused(x), expected)
    made.fused.save(tmp_path / "fused.pt")
    assert torch.equal(torchscript.load(str(tmp_path / "fused.pt"))(x), made.fused(x))
    assert (tmp_path / "fused.pt").stat().st_size < head.packed.numel() + 90_000


class Residual(nn.Module):
    """A convolution that halves images, and two more around a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 32, 3, 2, 1)
        self.second, self.third = (nn.Conv2d(32, 32, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return (self.third(self.second(x).relu()) + x).relu()


@WAYS
def test_an_int8_residual_network_is_a_file_of_kernels(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum and its activation are part of a kernel; the file is as near to the float model as
    the int8 model, twice in a row and at other sizes, and refuses those at which oneDNN is wrong.
    """
    fastest(way, monkeypatch)
    model = randomized(Residual())
    int8, x = in_int8(model), randn(2, 16, 20, 24)
    made = planning.plan(int8, x)
    kernels = ("qconv_pointwise.tensor", "qconv2d_pointwise.binary_tensor")
    found = [made.after[f"onednn.{name}"] for name in kernels]
    whole = way == planning.INTEGERS
    assert found == ([2, 1] if whole else [0, 0])
    assert made.after["aten.add_.Tensor"] == made.after["aten.relu_"] == 0
    small = [randn(3, 16, 2, 2)] if whole else []
    for images in (x, x, randn(1, 16, 9, 16), *small):
        pair = (relative_error([m(images)], [model(images)]) for m in (made.fused, int8))
        own, models = pair
        assert own <= 1.5 * models < 0.05
    if whole:
        with pytest.raises(Exception, match="sizes must be so that"):
            made.fused(randn(1, 16, 20, 2))


class InPlace(Residual):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        y = self.third(self.second(x).relu())
        y += x
        return y.relu()


def test_sums_in_place_are_part_of_kernels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer in float casts its result to the dtype that it has, which is the same memory."""
    fastest(planning.FLOATS, monkeypatch)
    int8, x = in_int8(randomized(InPlace())), randn(2, 16, 20, 24)
    made = planning.plan(int8, x)
    assert not {"aten.add_.Tensor", "aten.add.Tensor", "aten.to.dtype"} & set(made.after)
    assert_close(made.fused(x), planning.in_floats(int8)(x))


def test_padding_by_nothing_is_a_copy() -> None:
    """What is written into it isn't written into what was padded."""

    class Padded(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = x.relu()
            padded = torch.nn.functional.pad(y, (0, 0))
            padded += 1
            return y, padded

    model, x = Padded().eval(), randn(2, 3)
    for actual, expected in zip(fuse(model, x)(x), model(x), strict=True):
        assert torch.equal(actual, expected)


def test_int8_stays_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that is fast a quantized model's fused file multiplies in int8, by what the profiler
    sees, and gives the same answers.
    """
    in_integers(monkeypatch)
    model = randomized(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)))
    x = randn(4, 64)
    int8 = in_int8(model)
    fused = fuse(int8, x)
    assert_close(fused(x), int8(x))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fused(x)
    ran = {e.key for e in profile.key_averages()}
    assert any("int_mm" in k or "qlinear" in k for k in ran) and not ran & {
        "aten::linear",
        "aten::addmm",
        "aten::mm",
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_stay_half_in_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    """16-bit weights are stored in 16 bits, whatever they are computed in."""
    model = randomized(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)))
    half, x = quantize.to_half(model, dtype), randn(4, 256)
    fuse(half, x).save(tmp_path / "fused.pt")
    assert_close(torchscript.load(str(tmp_path / "fused.pt"))(x), half(x), dtype=dtype)
    assert (tmp_path / "fused.pt").stat().st_size < 0.6 * sum(
        p.numel() * 4 for p in model.parameters()
    )


def test_folded_models_stay_in_memory(tmp_path: Path) -> None:
    """Saving says that `fuse` gives a file; a file that names the builder of earlier versions is
    refused; copies work.
    """
    model, x = randomized(Image()), randn(2, 3, 16, 16)
    folded = fold(model, x)
    assert torch.equal(copy.deepcopy(folded)(x), folded(x))
    for held in (folded, nn.Sequential(folded)):
        with pytest.raises(TypeError, match=r"fold.*quantize\.fuse"):
            quantize.save(held, tmp_path / "folded.pth")
    model.__dict__["_structure"] = [
        ("folded", {"edits": [], "inputs": {}, "keyword": False, "way": "simplified"}, "")
    ]
    quantize.save(model, tmp_path / "old.pth")
    with pytest.raises(quantize.CheckpointError, match="'folded'"):
        quantize.load(tmp_path / "old.pth", model=Image())


def test_weights_packed_for_a_folded_model_follow_changes() -> None:
    """A changed weight is seen, although the kernel reads a packed copy."""
    model, x = randomized(nn.Sequential(nn.Linear(4, 4))), randn(2, 4)
    folded = fold(model, x)
    before = folded(x)
    with torch.no_grad():
        for tensor in folded.buffers():
            tensor.mul_(2)
    assert_close(folded(x), before * 2)


@pytest.mark.slow
def test_notes_of_the_model_and_of_fusing_go_with_the_result() -> None:
    """The summary of a fused or folded model has the steps before it, and how far the fused one is
    from the model.
    """
    model, x = quantize.to_half(randomized(Image())), randn(1, 3, 16, 16)
    for made, technique in ((fold(model, x), "fold"), (copy.deepcopy(fuse(model, x)), "fuse")):
        steps = quantize.summary(made).steps
        assert [s.technique for s in steps][-1] == technique and len(steps) == len(
            quantize.summary(model).steps
        ) + 1
        assert steps[-1].distance <= 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(("fused_ms", "warns"), [(3.0, True), (2.0, False)])
def test_a_slower_fused_model_says_both_times(
    fused_ms: float, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where layers in integers are faster by themselves than as stock operations."""
    times = {"fused": fused_ms, "model": 2.0}
    monkeypatch.setattr(fusing, "_times", lambda *_: times)
    model = in_int8(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fuse(model, randn(2, 32))
    told = [str(one.message) for one in caught if "fused takes" in str(one.message)]
    assert len(told) == warns
    assert all("3 ms here, the model itself 2:" in line for line in told)


def test_an_int8_lstm_is_refused_by_name() -> None:
    """Its loop over time is code of this package, which a file can't hold."""
    model = in_int8(nn.Sequential(nn.LSTM(32, 32, batch_first=True)).eval())
    with pytest.raises(
        ValueError, match=r"layer '0' \(Int8LSTM\) can't be fused: .*loop over time"
    ):
        fuse(model, randn(2, 5, 32))


@pytest.mark.parametrize("size", [1, 127])
def test_a_cpu_that_cuts_sums_off_is_known_by_the_largest(size: int) -> None:
    """With small weights the trial passes everywhere, with the largest where products are whole."""
    lines = [line.replace("127", str(size)) for line in integers._TRIAL]
    assert torchscript.succeeds(lines) is (size == 1 or integers.available())


def test_a_file_from_another_cpu_refuses_to_load(monkeypatch, tmp_path: Path) -> None:
    """What is tried when a file is made is tried again where it is loaded."""
    made = planning.plan(nn.Sequential(nn.Linear(8, 8)).eval(), randn(2, 8))
    made.program.at_load = ["exact = torch.zeros([1]).sum() == 0", integers.REFUSES]
    torchscript.compile(made.program).save(tmp_path / "good.pt")
    assert torchscript.load(str(tmp_path / "good.pt"))(randn(2, 8)).shape == (2, 8)
    made.program.at_load = ["exact = False", integers.REFUSES]
    with pytest.raises(Exception, match="cuts int8 convolutions off at 16 bits"):
        torchscript.compile(made.program)
