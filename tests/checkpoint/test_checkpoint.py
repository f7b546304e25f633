"""Files give back exactly what was saved, and save refuses what a file can't hold."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from checkpoint_models import IDS, Holder, Net, Tiny, TinyConfig, assert_same, both, net
from fresh import ROOT
from helpers import in_int8
from torch import nn

from quantize.checkpoint import CheckpointError, contents, load, read_metadata, read_record, save
from quantize.models import DecoderConfig, DecoderLM


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@both
def test_foreign_model_comes_back(tmp_path, suffix):
    """Same bits, ties, flags and outputs, in eval mode; the instance that was passed stays as it
    was.
    """
    model, path = net(), tmp_path / f"m{suffix}"
    save(model, path)
    fresh = Net().train()
    before = {n: t.clone() for n, t in fresh.state_dict().items()}
    loaded = load(path, fresh)
    assert_same(loaded, model)
    assert torch.equal(loaded(IDS), model(IDS))
    assert loaded.head.weight is loaded.embed.weight and loaded.again is loaded.body
    assert (
        not loaded.training
        and not loaded.body.bias.requires_grad
        and loaded.body.weight.requires_grad
    )
    assert loaded is not fresh and fresh.training
    assert all(torch.equal(t, before[n]) for n, t in fresh.state_dict().items())


@both
def test_builtin_model_comes_back_by_itself(tmp_path, suffix):
    """The file alone rebuilds the class, with an equal config, and draws no random numbers."""
    model, path = Tiny(TinyConfig(width=6, layers=3, sizes=(1, 2))), tmp_path / f"m{suffix}"
    save(model, path)
    state = torch.get_rng_state()
    loaded = load(path)
    assert torch.equal(state, torch.get_rng_state())
    assert type(loaded) is Tiny and loaded.config == model.config
    assert_same(loaded, model)
    assert_same(load(path, Tiny(model.config)), model)


@both
def test_same_model_same_bytes(tmp_path, suffix):
    """Saving is deterministic, and so is saving what was loaded."""
    save(net(), tmp_path / f"a{suffix}", metadata={"x": [1, 2.5, None]})
    torch.manual_seed(0)
    save(
        load(tmp_path / f"a{suffix}", Net()),
        tmp_path / f"b{suffix}",
        metadata={"x": [1, 2.5, None]},
    )
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


SHAPES = [(), (0,), (3,), (2, 3), (2, 0, 3), (3, 1, 2), (2, 3, 1, 3)]


def layouts(dtype: torch.dtype) -> list[torch.Tensor]:
    """Random bits of each shape, in each order of its axes."""
    tensors = []
    for shape in SHAPES:
        for order in itertools.permutations(range(len(shape))):
            tensor = torch.empty(shape, dtype=dtype)
            if dtype == torch.bool:
                tensor.random_(0, 2)
            else:
                tensor.reshape(-1).view(torch.uint8).random_(0, 256)
            tensors.append(tensor.permute(order))
    return tensors


@both
def test_every_dtype_shape_and_layout(tmp_path, suffix):
    """Any dtype, 0-d and empty tensors, non-contiguous ones, all in one file: same bits and same
    strides; NaN payloads too.
    """
    known = [dtype for dtype in DTYPES if suffix == ".pth" or dtype != torch.complex128]
    tensors = list(itertools.chain.from_iterable(map(layouts, known)))
    random.Random(0).shuffle(tensors)
    path = tmp_path / f"m{suffix}"
    save(Holder(*tensors), path)
    loaded = load(path, Holder(*[torch.zeros_like(t) for t in tensors]))
    assert_same(loaded, Holder(*tensors))
    assert len(list(loaded.buffers())) == len(tensors)
    assert [t.stride() for t in loaded.buffers()] == [torch.empty_like(t).stride() for t in tensors]


@pytest.mark.parametrize("shape", SHAPES)
def test_safetensors_has_no_complex128(tmp_path, shape):
    """The message says where it goes."""
    with pytest.raises(ValueError, match=r"complex128.*save as .pth"):
        save(Holder(torch.zeros(shape, dtype=torch.complex128)), tmp_path / "m.safetensors")


@both
def test_other_libraries_read_the_files(tmp_path, suffix):
    """torch.load(weights_only=True) and safetensors read the tensors by name."""
    model, path = net(), tmp_path / f"m{suffix}"
    save(model, path, metadata={"a": 1})
    if suffix == ".pth":
        content = torch.load(path, weights_only=True, mmap=True)
        assert content["format"] == "quantize" and content["version"] == contents.VERSION
        assert json.loads(content["record"])["metadata"] == {"a": 1}
        tensors = content["tensors"]
    else:
        tensors = safetensors.torch.load_file(path)
        with safetensors.safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["record"])["metadata"] == {"a": 1}
    state = model.state_dict()
    assert set(tensors) == set(state) - set(read_record(path)["aliases"])
    assert all(torch.equal(t, state[n]) for n, t in tensors.items())


@both
def test_ties_are_stored_once_and_tied_again(tmp_path, suffix):
    """A tie that only the saved model has is there after loading, and one that only the fresh model
    has is not.
    """

    class Two(nn.Module):
        def __init__(self, tie):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            if tie:
                self.b.weight = self.a.weight

    for tie in (True, False):
        model, path = Two(tie), tmp_path / f"m{suffix}"
        save(model, path)
        assert len(read_record(path)["tensors"]) == (1 if tie else 2)
        loaded = load(path, Two(not tie))
        assert (loaded.a.weight is loaded.b.weight) == tie
        assert_same(loaded, model)


@both
def test_views_are_stored_apart(tmp_path, suffix):
    """Tensors that share part of a storage, or are a parameter here and a buffer there, get
    storages of their own.
    """
    base = torch.randn(4, 4)
    model = Holder(base, base[1:], base.t(), base[0].expand(5, 4))
    model.p = nn.Parameter(base)
    save(model, tmp_path / f"m{suffix}")
    fresh = Holder(*[torch.zeros_like(b) for b in (base, base[1:], base, base[0].expand(5, 4))])
    fresh.p = nn.Parameter(torch.zeros(4, 4))
    loaded = load(tmp_path / f"m{suffix}", fresh)
    assert_same(loaded, model)
    assert len({t.untyped_storage().data_ptr() for t in loaded.state_dict().values()}) == 5
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in loaded.state_dict().values())


@both
def test_small_view_does_not_drag_its_storage_along(tmp_path, suffix):
    """Eight bytes of a large tensor take eight bytes in the file."""
    save(Holder(torch.zeros(100_000)[:2]), tmp_path / f"m{suffix}")
    assert (tmp_path / f"m{suffix}").stat().st_size < 5000


@both
def test_channels_last_comes_back(tmp_path, suffix):
    """The order of weights in memory chooses kernels, so it is part of the model."""
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    save(model, tmp_path / f"m{suffix}")
    loaded = load(tmp_path / f"m{suffix}", nn.Conv2d(3, 4, 3))
    assert loaded.weight.stride() == model.weight.stride() and torch.equal(
        loaded.weight, model.weight
    )


@both
def test_dtype_of_the_model_that_was_saved(tmp_path, suffix):
    """A model converted by .half() or .double() comes back in that dtype, whatever the fresh
    instance is in.
    """
    for convert in (nn.Module.half, nn.Module.double, nn.Module.bfloat16):
        model = convert(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))
        save(model, tmp_path / f"m{suffix}")
        assert_same(
            load(tmp_path / f"m{suffix}", nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))), model
        )


@both
def test_storage_in_16_bits_computes_as_before(tmp_path, suffix):
    """Where state_dict() gives another dtype than the module lives in, the loaded module lives in
    its own again.
    """

    class Narrow(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.weight.data = self.weight.data.half().float()
            self.register_state_dict_post_hook(
                lambda m, state, prefix, _: state.update({f"{prefix}weight": m.weight.half()})
            )

    model, path = Narrow(), tmp_path / f"m{suffix}"
    save(model, path)
    loaded = load(path, Narrow())
    assert read_record(path)["tensors"]["weight"]["dtype"] == "float16"
    assert loaded.weight.dtype == torch.float32 and torch.equal(loaded.weight, model.weight)


@both
def test_metadata_and_versions(tmp_path, suffix):
    """Metadata comes back without the tensors being read; versions are noted."""
    metadata = {
        "metric": {"bits": 1.5},
        "recipe": ["int8"],
        "name": "é\n\u2028",
        "inf": float("inf"),
    }
    save(net(), tmp_path / f"m{suffix}", metadata=metadata)
    assert read_metadata(tmp_path / f"m{suffix}") == metadata
    assert read_record(tmp_path / f"m{suffix}")["versions"]["torch"] == torch.__version__


@both
def test_tensor_extra_state(tmp_path, suffix):
    """Extra state that is a tensor is saved, of whatever shape; other extra state is a TypeError
    naming it.
    """

    class Extra(nn.Linear):
        def get_extra_state(self):
            return self.extra

        def set_extra_state(self, state):
            self.extra = state

    model, fresh = Extra(1, 1), Extra(1, 1)
    model.extra, fresh.extra = torch.arange(3), torch.zeros(1)
    save(model, tmp_path / f"m{suffix}")
    assert torch.equal(load(tmp_path / f"m{suffix}", fresh).extra, model.extra)
    model.extra = {"a": 1}
    with pytest.raises(TypeError, match="'_extra_state' of type dict"):
        save(model, tmp_path / f"m{suffix}")


@both
def test_parametrized_and_normed_modules(tmp_path, suffix):
    """torch's parametrizations keep their originals; the recomputed weight is equal."""

    def build():
        return nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.MultiheadAttention(4, 2)
        )

    model = build()
    save(model, tmp_path / f"m{suffix}")
    loaded = load(tmp_path / f"m{suffix}", build())
    assert_same(loaded, model)
    assert torch.equal(loaded[0].weight, model[0].weight)


@pytest.mark.slow
def test_loading_and_running_imports_no_compiler(tmp_path):
    """Loading a built-in model in int8 in a fresh process, and calling it until its calls are
    replayed, doesn't pull in torch._dynamo or sympy, which take seconds and memory.
    """
    model = DecoderLM(DecoderConfig(width=32, layers=2, heads=2)).eval()
    save(in_int8(model), tmp_path / "m.pth")
    code = (
        "import sys, torch, quantize.models\nfrom quantize.checkpoint import load\n"
        "model, _ = load(sys.argv[1]), torch.set_grad_enabled(False)\n"
        "for _ in range(4): model(torch.ones(2, 32, dtype=torch.long))\n"
        "sys.exit(' '.join({'torch._dynamo', 'sympy'} & set(sys.modules)) or 0)\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "m.pth"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["m.pt", "m", "m.pth.gz", "m.PTH"])
def test_other_suffixes(tmp_path, name):
    """Only the two containers, by name; nothing is written."""
    with pytest.raises(ValueError, match=r"\.pth or \.safetensors"):
        save(net(), tmp_path / name)
    with pytest.raises(CheckpointError, match=r"\.pth or \.safetensors"):
        load(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (Holder(torch.zeros(2, 2).to_sparse()), "'a'.*sparse"),
        (Holder(torch.zeros(2, device="meta")), "'a'.*meta"),
        (nn.LazyLinear(2), "'weight' has no shape yet"),
        ({"weight": torch.zeros(1)}, "dict"),
    ],
)
def test_state_that_is_no_plain_tensor(tmp_path, model, named):
    """A TypeError naming it, and no file."""
    with pytest.raises(TypeError, match=named):
        save(model, tmp_path / "m.pth")
    assert not list(tmp_path.iterdir())


def test_metadata_that_is_not_json(tmp_path):
    """A TypeError, and no file."""
    for metadata in ({"a": torch.zeros(1)}, {"a": {1, 2}}, [1]):
        with pytest.raises(TypeError, match="metadata"):
            save(net(), tmp_path / "m.pth", metadata=metadata)
    with pytest.raises(ValueError, match="at most"):
        save(net(), tmp_path / "m.pth", metadata={"a": "x" * 10_000_000})
    assert not list(tmp_path.iterdir())
