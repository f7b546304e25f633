"""16-bit weights: what is rounded, what stays exact, what runs."""

import copy
import pickle

import pytest
import torch
from helpers import ZOO, assert_close, cosine, run, zoo
from torch import nn

import quantize
from quantize import host

DTYPES = [torch.float16, torch.bfloat16]


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
    ).eval()


@pytest.mark.filterwarnings("ignore:kept exact:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ZOO)
def test_zoo(name, dtype, tmp_path):
    """Outputs stay close, and the file loaded into a fresh model gives the same bits as the model
    in memory.
    """
    model, inputs = zoo(name, shallow=True)
    before = copy.deepcopy(model.state_dict())
    half = quantize.to_half(model, dtype)
    output = run(half, inputs)
    # the worst: MobileNetV2
    assert cosine(output, run(model, inputs)) > (0.999 if dtype == torch.float16 else 0.98)
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    for suffix in (".pth", ".safetensors"):
        quantize.save(half, tmp_path / f"half{suffix}")
        fresh, _ = zoo(name, seed=1, shallow=True)
        assert torch.equal(
            run(quantize.load(tmp_path / f"half{suffix}", model=fresh), inputs), output
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_dict_is_16_bit_and_buffers_are_exact(dtype):
    """Parameters come out of `state_dict()` in 16 bits, rounded once; running statistics and
    counters are untouched.
    """
    model = small_net()
    state, half = model.state_dict(), quantize.to_half(model, dtype).state_dict()
    parameters = dict(model.named_parameters())
    for name, value in state.items():
        assert torch.equal(half[name], value.to(dtype) if name in parameters else value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_computes_with_the_rounded_weights(dtype):
    """Against the oracle: the same network with weights rounded by hand, in float32."""
    model, x = small_net(), torch.randn(2, 3, 8, 8)
    oracle = copy.deepcopy(model)
    for parameter in oracle.parameters():
        parameter.data = parameter.data.to(dtype).float()
    factor = 1 if host.compute_dtype(dtype) != torch.float32 else 1e-3
    assert_close(run(quantize.to_half(model, dtype), x), run(oracle, x), dtype=dtype, factor=factor)


@pytest.mark.parametrize("native", [True, False])
def test_compute_dtype(native, monkeypatch):
    """No stored bit is lost: fp16 computes in fp32 on a CPU, bf16 in bf16 only where that is
    native.
    """
    monkeypatch.setattr(host, "native_bf16", lambda device="cpu": native)
    assert host.compute_dtype(torch.float16) == torch.float32
    assert host.compute_dtype(torch.bfloat16) == (torch.bfloat16 if native else torch.float32)
    assert host.compute_dtype(torch.float16, "cuda") == torch.float16
    layer = quantize.to_half(nn.Linear(4, 4), torch.bfloat16)
    assert layer._parameters["weight"].dtype == host.compute_dtype(torch.bfloat16)
    assert layer.weight.dtype == torch.float32
    assert layer(torch.ones(4)).dtype == torch.float32


@pytest.mark.parametrize("value", [1e6, 1e-9, float("nan"), float("inf")])
def test_what_fp16_cannot_hold_stays_exact_and_is_named(value):
    """Overflow, underflow and non-finite values are reported by name and kept."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight.fill_(value)
    with pytest.warns(UserWarning, match=r"1\.weight"):
        half = quantize.to_half(model)
    torch.testing.assert_close(
        half.state_dict()["1.weight"], model[1].weight.data, rtol=0, atol=0, equal_nan=True
    )
    assert half.state_dict()["0.weight"].dtype == torch.float16


def test_tied_weights_stay_tied(tmp_path):
    """A head tied to the embedding is rounded once, stays shared and is stored once."""
    model = nn.ModuleDict({"embed": nn.Embedding(64, 32), "head": nn.Linear(32, 64, bias=False)})
    model["head"].weight = model["embed"].weight
    half = quantize.to_half(model)
    assert half["head"].weight is half["embed"].weight
    quantize.save(half, tmp_path / "tied.safetensors")
    assert (tmp_path / "tied.safetensors").stat().st_size < 1.8 * 64 * 32 * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_survives_copy_pickle_and_dtype_changes(dtype):
    """deepcopy, pickling and `.to` keep the storage and the results."""
    half, x = quantize.to_half(small_net(), dtype), torch.randn(1, 3, 8, 8)
    for twin in (
        copy.deepcopy(half),
        pickle.loads(pickle.dumps(half)),
        copy.deepcopy(half).to("cpu"),
    ):
        assert torch.equal(run(twin, x), run(half, x))
        assert twin.state_dict()["4.weight"].dtype == dtype


@pytest.mark.parametrize("later", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_repeats_a_later_cast(dtype, later, tmp_path):
    """What a 16-bit model was cast to afterwards is what its file gives, in layers that cast and in
    others.
    """
    half, x = quantize.to_half(small_net(), dtype).to(later), torch.ones(1, 3, 8, 8, dtype=later)
    quantize.save(half, tmp_path / "half.safetensors")
    output = run(half, x)
    assert output.dtype == later
    assert torch.equal(
        run(quantize.load(tmp_path / "half.safetensors", model=small_net()), x), output
    )


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_export_and_trace(dtype):
    """torch.export and TorchScript tracing give the same numbers."""
    half, x = quantize.to_half(small_net(), dtype), torch.randn(2, 3, 8, 8)
    expected = run(half, x)
    assert_close(run(torch.export.export(half, (x,)).module(), x), expected)
    assert_close(torch.jit.trace(half, x)(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_encoder_fast_path_still_works(dtype):
    """`nn.TransformerEncoderLayer` reads its layers' weights directly: they stay in one dtype."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    assert_close(run(quantize.to_half(model, dtype), x), run(model, x), dtype=dtype)


def test_16_bit_models_are_widened_where_slow(tmp_path):
    """The layers of a float16 model compute in float32 on a CPU; what it takes and gives stays
    float16, also from a file.
    """
    model, x = small_net(), torch.ones(1, 3, 8, 8)
    half = quantize.to_half(copy.deepcopy(model).half())
    assert half[0]._parameters["weight"].dtype == torch.float32
    output = run(half, x.half())
    assert output.dtype == half[0].weight.dtype == torch.float16
    assert_close(output, run(model, x), dtype=torch.float16)
    quantize.save(half, tmp_path / "half.pth")
    for fresh in (small_net(), small_net().half()):
        assert torch.equal(run(quantize.load(tmp_path / "half.pth", model=fresh), x.half()), output)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_inputs_and_outputs_keep_their_dtype(given, dtype):
    """Whatever dtype a model computes in, its 16-bit copy takes and gives that one, and its weights
    read in it.
    """
    model, x = small_net().to(given), torch.ones(1, 3, 8, 8, dtype=given)
    half = quantize.to_half(model, dtype)
    assert run(half, x).dtype == given
    assert half[0].weight.dtype == half[4].bias.dtype == given
    assert half.state_dict()["4.weight"].dtype == dtype
    assert_close(run(half, x), run(model, x), dtype=torch.bfloat16)


def test_skip_leaves_layers_exact():
    """Skipped modules keep every bit."""
    model = small_net()
    state = quantize.to_half(model, skip=("4", nn.BatchNorm2d)).state_dict()
    assert {n for n, t in state.items() if t.dtype == torch.float16} == {"0.weight", "0.bias"}
    assert torch.equal(state["4.weight"], model[4].weight)


def test_input_flags_stay():
    """Training flags, requires_grad and hooks of the input survive, and the copy has them too."""
    model = small_net().train()
    model[0].weight.requires_grad_(False)
    half = quantize.to_half(model)
    assert model.training and half.training and not half[0].weight.requires_grad
    assert not model[0]._state_dict_hooks and type(model[0]) is nn.Conv2d


@pytest.mark.parametrize(
    ("model", "arguments", "error"),
    [
        (nn.Linear(2, 2), {"dtype": torch.int8}, ValueError),
        (nn.Linear(2, 2), {"dtype": torch.float32}, ValueError),
        (nn.ReLU(), {}, ValueError),
        ("model", {}, TypeError),
        (nn.Linear(2, 2), {"skip": ("missing",)}, ValueError),
        (nn.Linear(2, 2), {"skip": "missing"}, TypeError),
        (quantize.to_half(nn.Linear(2, 2)), {}, ValueError),
        (nn.Linear(2, 2, device="meta"), {}, ValueError),
    ],
)
def test_bad_input(model, arguments, error):
    """Each mistake is a named error."""
    with pytest.raises(error):
        quantize.to_half(model, **arguments)
