"""Files give back exactly what was saved, and nothing but a whole, unaltered, harmless file is loaded."""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import os
import pickle
import random
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from unittest import mock

import hypothesis
import pytest
import safetensors.torch
import torch
from hypothesis import strategies as st
from torch import nn

from quantize import surgery
from quantize.checkpoint import CheckpointError, architecture, atomic_write, container, load, read_metadata, read_record, save
from quantize.models import DecoderConfig, DecoderLM

SUFFIXES = [".pth", ".safetensors"]
both = pytest.mark.parametrize("suffix", SUFFIXES)


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    width: int = 4
    layers: int = 2
    sizes: tuple[int, ...] = (3, 5)

    def __post_init__(self):
        if not isinstance(self.width, int) or self.width < 1:
            raise ValueError(f"width is {self.width!r}; allowed: an integer >= 1")


@architecture
class Tiny(nn.Module):
    """A built-in model."""

    config_class = TinyConfig

    def __init__(self, config: TinyConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.layers))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        for block in self.blocks:
            x = block(x).relu()
        return x


class Net(nn.Module):
    """A foreign model with a tie, a shared module, an LSTM, BatchNorm, frozen parameters, a buffer that isn't saved."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.norm = nn.BatchNorm1d(4)
        self.body = nn.Linear(4, 4)
        self.again = self.body
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.body.bias.requires_grad_(False)
        self.register_buffer("shift", torch.full((10,), 0.5), persistent=False)

    def forward(self, ids):
        x = self.lstm(self.embed(ids))[0]
        return self.head(self.again(self.body(self.norm(x.transpose(1, 2)).transpose(1, 2)))) + self.shift


class Holder(nn.Module):
    """Holds the given tensors as buffers a, b, c, ..."""

    def __init__(self, *tensors: torch.Tensor):
        super().__init__()
        for name, tensor in zip("abcdefgh", tensors, strict=False):
            self.register_buffer(name, tensor)


class Doubled(nn.Module):
    def __init__(self, weight: torch.Tensor, bits: int):
        super().__init__()
        self.register_buffer("weight8", weight)
        self.bits = bits

    def forward(self, x):
        return nn.functional.linear(x, self.weight8.float())


@surgery.builder
def doubled_for_test(module: nn.Module, shape: list[int], bits: int) -> nn.Module:
    return Doubled(torch.zeros(shape, dtype=torch.int8), bits)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def net() -> Net:
    model = Net()
    model.norm.running_mean.normal_()
    return model.eval()


IDS = torch.arange(10).reshape(2, 5)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """Same names, dtypes and bits."""
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name, x in a.items():
        y = b[name]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        assert bits(x) == bits(y), name


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# Round trips


@both
def test_foreign_model_comes_back(tmp_path, suffix):
    """Same bits, ties, flags and outputs, in eval mode; the instance that was passed stays as it was."""
    model, path = net(), tmp_path / f"m{suffix}"
    save(model, path)
    fresh = Net().train()
    before = {n: t.clone() for n, t in fresh.state_dict().items()}
    loaded = load(path, fresh)
    assert_same(loaded, model)
    assert torch.equal(loaded(IDS), model(IDS))
    assert loaded.head.weight is loaded.embed.weight and loaded.again is loaded.body
    assert not loaded.training and not loaded.body.bias.requires_grad and loaded.body.weight.requires_grad
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
    save(load(tmp_path / f"a{suffix}", Net()), tmp_path / f"b{suffix}", metadata={"x": [1, 2.5, None]})
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool, torch.uint8,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn,
    torch.float8_e5m2,
]  # fmt: skip


@both
@hypothesis.given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=4)), max_size=5), st.data())
@hypothesis.settings(
    deadline=None, max_examples=60, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_every_dtype_shape_and_layout(tmp_path, suffix, kinds, data):
    """Any dtype, 0-d and empty tensors, non-contiguous ones: same bits and same strides; NaN payloads too."""
    tensors = []
    for dtype, shape in kinds:
        tensor = torch.empty(shape, dtype=dtype)
        if dtype == torch.bool:
            tensor.random_(0, 2)
        else:
            tensor.reshape(-1).view(torch.uint8).random_(0, 256)
        order = data.draw(st.permutations(range(len(shape))))
        tensors.append(tensor.permute(*order) if order else tensor)
    path = tmp_path / f"m{suffix}"
    if suffix == ".safetensors" and torch.complex128 in [t.dtype for t in tensors]:
        with pytest.raises(ValueError, match=r"complex128.*save as .pth"):
            save(Holder(*tensors), path)
        return
    save(Holder(*tensors), path)
    loaded = load(path, Holder(*[torch.zeros_like(t) for t in tensors]))
    assert_same(loaded, Holder(*tensors))
    assert [t.stride() for t in loaded.buffers()] == [torch.empty_like(t).stride() for t in tensors]


@both
def test_other_libraries_read_the_files(tmp_path, suffix):
    """torch.load(weights_only=True) and safetensors read the tensors by name."""
    model, path = net(), tmp_path / f"m{suffix}"
    save(model, path, metadata={"a": 1})
    if suffix == ".pth":
        content = torch.load(path, weights_only=True, mmap=True)
        assert content["format"] == "quantize" and content["version"] == container.VERSION
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
    """A tie that only the saved model has is there after loading, and one that only the fresh model has is not."""

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
    """Tensors that share part of a storage, or are a parameter here and a buffer there, get storages of their own."""
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
    assert loaded.weight.stride() == model.weight.stride() and torch.equal(loaded.weight, model.weight)


@both
def test_structure_record_on_a_foreign_model(tmp_path, suffix):
    """Resized and replaced modules are rebuilt on a fresh instance; the result saves to the same bytes again."""
    model = net()
    surgery.resize(model.lstm, tensors={}, attributes={"dropout": 0.0})
    for name in ("weight", "bias", "running_mean", "running_var"):
        surgery.resize(model.norm, tensors={name: torch.randn(4).abs()}, attributes={"eps": 1e-3})
    new = Doubled(torch.randint(-5, 5, (4, 4), dtype=torch.int8), 8)
    surgery.record(new, "doubled_for_test", shape=[4, 4], bits=8)
    surgery.replace(model, {model.body: new})
    new = Doubled(torch.randint(-5, 5, (7, 4), dtype=torch.int8), 8)
    surgery.record(new, "doubled_for_test", shape=[7, 4], bits=8)
    surgery.replace(model, {model.head: new})
    model.shift = model.shift[:1]  # not in the file; broadcast as the fresh one must
    path = tmp_path / f"m{suffix}"
    save(model, path)
    fresh = Net()
    fresh.shift = fresh.shift[:1]
    loaded = load(path, fresh)
    assert_same(loaded, model)
    assert torch.equal(loaded(IDS), model(IDS)) and loaded.body.bits == 8 and loaded.again is loaded.body
    save(loaded, tmp_path / f"again{suffix}")
    assert path.read_bytes() == (tmp_path / f"again{suffix}").read_bytes()


@both
def test_dtype_of_the_model_that_was_saved(tmp_path, suffix):
    """A model converted by .half() or .double() comes back in that dtype, whatever the fresh instance is in."""
    for convert in (nn.Module.half, nn.Module.double, nn.Module.bfloat16):
        model = convert(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))
        save(model, tmp_path / f"m{suffix}")
        assert_same(load(tmp_path / f"m{suffix}", nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))), model)


@both
def test_storage_in_16_bits_computes_as_before(tmp_path, suffix):
    """Where state_dict() gives another dtype than the module lives in, the loaded module lives in its own again."""

    class Narrow(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.weight.data = self.weight.data.half().float()
            self.register_state_dict_post_hook(lambda m, state, prefix, _: state.update({f"{prefix}weight": m.weight.half()}))

    model, path = Narrow(), tmp_path / f"m{suffix}"
    save(model, path)
    loaded = load(path, Narrow())
    assert read_record(path)["tensors"]["weight"]["dtype"] == "float16"
    assert loaded.weight.dtype == torch.float32 and torch.equal(loaded.weight, model.weight)


@both
def test_metadata_and_versions(tmp_path, suffix):
    """Metadata comes back without the tensors being read; versions are noted."""
    metadata = {"metric": {"bits": 1.5}, "recipe": ["int8"], "name": "é\n\u2028", "inf": float("inf")}
    save(net(), tmp_path / f"m{suffix}", metadata=metadata)
    assert read_metadata(tmp_path / f"m{suffix}") == metadata
    assert read_record(tmp_path / f"m{suffix}")["versions"]["torch"] == torch.__version__


@both
def test_tensor_extra_state(tmp_path, suffix):
    """Extra state that is a tensor is saved, of whatever shape; other extra state is a TypeError naming it."""

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
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.MultiheadAttention(4, 2))

    model = build()
    save(model, tmp_path / f"m{suffix}")
    loaded = load(tmp_path / f"m{suffix}", build())
    assert_same(loaded, model)
    assert torch.equal(loaded[0].weight, model[0].weight)


@pytest.mark.slow
def test_loading_imports_no_compiler(tmp_path):
    """Loading a built-in model in a fresh process doesn't pull in torch._dynamo or sympy, which take seconds and memory."""
    save(DecoderLM(DecoderConfig(width=8, layers=1, heads=2)), tmp_path / "m.pth")
    code = (
        "import sys, quantize.models\nfrom quantize.checkpoint import load\nload(sys.argv[1])\n"
        "sys.exit(' '.join({'torch._dynamo', 'sympy'} & set(sys.modules)) or 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, tmp_path / "m.pth"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# What save refuses


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


def test_resized_buffer_that_is_not_saved(tmp_path):
    """Refused when saving, not found out when loading."""
    model = net()
    surgery.resize(model, tensors={"shift": torch.zeros(1)}, attributes={})
    with pytest.raises(TypeError, match="shift"):
        save(model, tmp_path / "m.pth")


# Another model than the file's


@both
def test_another_architecture(tmp_path, suffix):
    """Names both classes and the first differences; the model that was passed is untouched."""
    path = tmp_path / f"m{suffix}"
    save(net(), path)
    with pytest.raises(CheckpointError, match=r"another architecture: .* a Net, the model is a Linear.*and \d+ more"):
        load(path, nn.Linear(2, 2))
    other = Net()
    other.norm = nn.BatchNorm1d(5)
    with pytest.raises(CheckpointError, match=r"'norm.bias' is torch.float32 \[4\] in the file, torch.float32 \[5\]"):
        load(path, other)
    other = Net()
    other.norm.register_buffer("num_batches_tracked", torch.zeros(()))
    with pytest.raises(CheckpointError, match=r"'norm.num_batches_tracked' is torch.int64"):
        load(path, other)
    with pytest.raises(CheckpointError, match=r"holds a Net.*pass model=Net\("):
        load(path)
    with pytest.raises(TypeError, match="pass model=Net"):
        load(path, Net)


def test_another_class_that_fits(tmp_path):
    """Names and shapes decide, not the name of the class."""

    class Renamed(Net):
        pass

    model = net()
    save(model, tmp_path / "m.pth")
    loaded = load(tmp_path / "m.pth", Renamed())
    assert type(loaded) is Renamed
    assert_same(loaded, model)


def rewrite(path: Path, change) -> None:
    """Write the file again, sealed as if by `save`, with its record changed: what an attacker can do."""
    suffix = path.suffix
    with path.open("rb") as file:
        record, places = container.read_header(file, suffix)
        specs = record.pop("tensors")
        tensors = {n: container.read_tensor(file, *p, **s) for (n, s), p in zip(specs.items(), places, strict=True)}
    change(record)
    with mock.patch.object(container, "_parse_record", lambda _, text: json.loads(text)):
        container.write(path, record, tensors)


@both
@pytest.mark.parametrize(
    "config",
    [
        {"width": 10**9},
        {"width": 10**18},
        {"width": 10**30},
        {"layers": 10**9},
        {"width": 1, "layers": 10**9},
        {"width": "4"},
        {"width": -1},
        {"nonsense": 1},
        {"width": [[1]]},
    ],
)
def test_hostile_config(tmp_path, suffix, config):
    """Huge, endless or senseless configs are refused at once, with nothing allocated."""
    path = tmp_path / f"m{suffix}"
    save(Tiny(TinyConfig()), path)
    rewrite(path, lambda record: record["architecture"]["config"].update(config))
    with pytest.raises(CheckpointError, match="m" + suffix):
        load(path)


@both
@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["structure"].append({"module": "body", "builder": "system", "arguments": {}}),
        lambda r: r["structure"].append({"module": "body"}),
        lambda r: r["structure"].append(3),
        lambda r: r["structure"].append({"module": "nobody", "builder": "resized", "arguments": {}}),
        lambda r: r["structure"].append(
            {"module": "body", "builder": "doubled_for_test", "arguments": {"shape": [10**6, 10**6], "bits": 1}}
        ),
        lambda r: r["structure"].append(
            {"module": "body", "builder": "resized", "arguments": {"shapes": {"weight": [10**9, 10**9]}, "attributes": {}}}
        ),
        lambda r: r["aliases"].update({"x": "y"}),
        lambda r: r["aliases"].update({"body.weight": "body.bias"}),
        lambda r: r["aliases"].update({"extra": "body.bias"}),
        lambda r: r["aliases"].update({"again.weight": 3}),
        lambda r: r["strides"].update({"body.weight": [0, 0]}),
        lambda r: r["strides"].update({"body.weight": [10**9, 10**9]}),
        lambda r: r["strides"].update({"body.weight": [5, 0]}),
        lambda r: r["strides"].update({"body.weight": [-1, 4]}),
        lambda r: r["strides"].update({"body.weight": "a"}),
        lambda r: r.update(metadata=[]),
        lambda r: r.pop("aliases"),
        lambda r: r.update(more=1),
        lambda r: r["architecture"].clear(),
    ],
)
def test_hostile_record(tmp_path, suffix, change):
    """Whatever a well-sealed record says, it is checked before anything is allocated or set."""
    path = tmp_path / f"m{suffix}"
    save(net(), path)
    rewrite(path, change)
    with pytest.raises(CheckpointError, match="m" + suffix):
        load(path, Net())


# Damage


@both
def test_every_flipped_bit_is_caught(tmp_path, suffix):
    """Each of 600 random bit flips, in tensors, names, padding and zip directory, is a CheckpointError."""
    path = tmp_path / f"m{suffix}"
    save(Tiny(TinyConfig(width=3)), path, metadata={"a": 1})
    whole, draw = path.read_bytes(), random.Random(1)
    for bit in draw.sample(range(8 * len(whole)), 600):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="m" + suffix):
            load(path)


@both
def test_every_truncation_is_caught(tmp_path, suffix):
    """So is each of 300 cuts, the empty file and the last byte among them, and bytes appended or put in front."""
    path = tmp_path / f"m{suffix}"
    save(Tiny(TinyConfig(width=3)), path)
    whole, draw = path.read_bytes(), random.Random(2)
    cuts = {0, 1, 7, 8, len(whole) - 1, *draw.sample(range(len(whole)), 295)}
    for damaged in [
        *(whole[:cut] for cut in cuts),
        whole + b"\0",
        whole + whole,
        b"\0" + whole,
        whole[:-64] + b"\0" + whole[-64:],
    ]:
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load(path)
        with pytest.raises(CheckpointError):
            read_metadata(path)


@both
def test_newer_version_says_so(tmp_path, suffix, monkeypatch):
    """A file of a later format says that it is newer, whoever wrote it."""
    path = tmp_path / f"m{suffix}"
    with monkeypatch.context() as patch:
        patch.setattr(container, "VERSION", 7)
        save(Tiny(TinyConfig()), path)
    with pytest.raises(CheckpointError, match=r"newer quantize \(format version 7; this one reads up to 2\)"):
        load(path)
    if suffix == ".pth":  # not our bytes any more, but the version can still be told
        content = torch.load(path, weights_only=True)
        torch.save(content | {"version": 12}, path)
        with pytest.raises(CheckpointError, match="format version 12"):
            load(path)


# Hostile files


class Reduce:
    """Pickles to a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def archive(pickled: bytes, more: dict[str, bytes] | None = None, compression=zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as z:
        z.writestr("archive/data.pkl", pickled)
        for name, content in {"version": b"3\n", "byteorder": b"little", **(more or {})}.items():
            z.writestr(f"archive/{name}", content)
    return file.getvalue()


def ours() -> bytes:
    file = io.BytesIO()
    torch.save({"format": "quantize", "version": 1, "record": "{}", "tensors": {"a": torch.zeros(2)}}, file)
    return zipfile.ZipFile(file).read("archive/data.pkl")


BODY = ours()[:-1]  # without STOP
TOUCH = "touch RAN"
STRING = b"X" + struct.pack("<I", len(TOUCH)) + TOUCH.encode()
PICKLES = {
    "reduce os.system": pickle.dumps(Reduce(os.system, (TOUCH,)), 2),
    "protocol 0": pickle.dumps(Reduce(os.system, (TOUCH,)), 0),
    "protocol 4, STACK_GLOBAL and frames": pickle.dumps(Reduce(os.system, (TOUCH,)), 4),
    "nested getattr": pickle.dumps(Reduce(getattr, (Reduce(__import__, ("os",)), "system")), 2),
    "after our own record": BODY + b"0cposix\nsystem\n(" + STRING + b"tR.",
    "in place of a tensor's global": ours().replace(b"ctorch._utils\n_rebuild_tensor_v2\n", b"cposix\nsystem\n"),
    "global with a dotted name": BODY + b"0ctorch\nserialization.os.system\n(" + STRING + b"tR.",
    "INST": BODY + b"0(" + STRING + b"iposix\nsystem\n.",
    "OBJ": BODY + b"0(cposix\nsystem\n" + STRING + b"o.",
    "NEWOBJ": BODY + b"0ccollections\nOrderedDict\n)\x81.",
    "BUILD on an allowed global": BODY + b"0ccollections\nOrderedDict\n)R}b.",
    "STACK_GLOBAL from memo": BODY + b"0\x8c\x05posix\x94\x8c\x06system\x94\x93" + STRING + b"\x85R.",
    "extension registry": BODY + b"0\x82\x01.",
    "persistent id as text": BODY + b"0Pcposix\n.",
    "second pickle behind ours": ours() + pickle.dumps(Reduce(os.system, (TOUCH,)), 2),
    "a frame": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.",
    "string of 2**60 bytes": b"\x80\x02\x8d" + struct.pack("<Q", 2**60) + b"a.",
    "string of 4 GB": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"a.",
    "integer of 2 GB": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"a.",
    "unhashable and memo nonsense": b"\x80\x02h\xffr\xff\xff\xff\xff}]]s.",
    "no stop": BODY,
    "empty": b"",
}


@pytest.mark.parametrize("name", PICKLES)
def test_hostile_pickles_are_refused_and_not_run(tmp_path, monkeypatch, name):
    """Inside a zip like torch's, and bare: a CheckpointError, and the command it carries hasn't run."""
    monkeypatch.chdir(tmp_path)
    for content in (archive(PICKLES[name], {"data/0": bytes(8)}), PICKLES[name]):
        Path("m.pth").write_bytes(content)
        for reader in (load, read_metadata):
            with pytest.raises(CheckpointError, match=r"m\.pth"):
                reader("m.pth")
    assert os.listdir() == ["m.pth"]  # noqa: PTH208


def legacy(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("storages"))
    return file.getvalue()


def scripted() -> bytes:
    file = io.BytesIO()
    with pytest.warns(FutureWarning):
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), file)
    return file.getvalue()


def pickled_by_torch(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def twice() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("archive/data.pkl", ours())
        with pytest.warns(UserWarning, match="Duplicate"):
            z.writestr("archive/data.pkl", PICKLES["reduce os.system"])
    return file.getvalue()


def overlapping() -> bytes:
    content = bytearray(archive(ours(), {"data/0": bytes(8), "data/1": bytes(8)}))
    directory = content.rindex(b"PK\x01\x02")
    before = content.rindex(b"PK\x01\x02", 0, directory)
    content[directory + 42 : directory + 46] = content[before + 42 : before + 46]
    return bytes(content)


def oversized() -> bytes:
    content = bytearray(archive(ours(), {"data/0": bytes(8)}))
    directory = content.rindex(b"PK\x01\x02")
    content[directory + 20 : directory + 28] = struct.pack("<II", 2**31, 2**31)
    return bytes(content)


FILES = {
    "bare state dict": (lambda: pickled_by_torch(nn.Linear(2, 2).state_dict()), "not written by quantize"),
    "whole module": (lambda: pickled_by_torch(nn.Linear(2, 2)), "its pickle calls"),
    "ordered dict of nothing": (lambda: pickled_by_torch(collections.OrderedDict()), "not written by quantize"),
    "legacy torch file": (lambda: legacy({"format": "quantize"}), "no zip archive"),
    "tar": (tarred, "no zip archive"),
    "TorchScript": (scripted, "TorchScript"),
    "compressed": (lambda: archive(ours(), compression=zipfile.ZIP_DEFLATED), "compressed"),
    "bomb": (lambda: archive(ours(), {"data/0": bytes(10**7)}, zipfile.ZIP_DEFLATED), "compressed"),
    "zip in a zip": (lambda: archive(ours(), {"data.zip": archive(b"x")}), "unexpected entry"),
    "code": (lambda: archive(ours(), {"code/__torch__.py": b""}), "TorchScript"),
    "path outside": (lambda: archive(ours(), {"../../evil": b""}), "unexpected entry"),
    "two entries of one name": (twice, "two entries"),
    "overlapping entries": (overlapping, "overlap"),
    "oversized entry": (oversized, "truncated"),
    "no pickle": (lambda: archive(ours()).replace(b"data.pkl", b"version2"), "unexpected entry"),
    "empty zip": (lambda: b"PK\x05\x06" + bytes(18), "no zip archive"),
    "text": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "no zip archive"),
}


@pytest.mark.parametrize("name", FILES)
def test_foreign_and_malformed_archives(tmp_path, name):
    """Each is refused with its reason."""
    content, reason = FILES[name]
    path = tmp_path / "m.pth"
    path.write_bytes(content())
    with pytest.raises(CheckpointError, match=reason):
        load(path, nn.Linear(2, 2))


def header(text: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


HEADERS = {
    "length 2**60": header(b"{}", 2**60),
    "length 2**64-1": header(b"{}", 2**64 - 1),
    "longer than the file": header(b"{}", 1000),
    "no header": b"",
    "seven bytes": bytes(7),
    "empty object": header(b"{}"),
    "a list": header(b"[]"),
    "not UTF-8": header(b'{"\xff\xfe":1}'),
    "deep nesting": header(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "key twice": header(b'{"__metadata__":{"record":"","record":""}}'),
    "huge integer": header(b'{"__metadata__":' + b"9" * 10_000 + b"}"),
    "metadata a list": header(b'{"__metadata__":["quantize_version","record"]}'),
    "version no number": header(b'{"__metadata__":{"quantize_version":"x","record":"{}"}}'),
    "record no object": header(b'{"__metadata__":{"quantize_version":"1","record":"[]"}}'),
    "plain safetensors": safetensors.torch.save({"weight": torch.zeros(2, 2)}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers(tmp_path, name):
    """Each malformed .safetensors header is refused."""
    (tmp_path / "m.safetensors").write_bytes(HEADERS[name])
    with pytest.raises(CheckpointError, match=r"m\.safetensors"):
        load(tmp_path / "m.safetensors", nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"data_offsets":[0,36]', b'"data_offsets":[0,99]'),
        (b'"data_offsets":[0,36]', b'"data_offsets":[-9,3]'),
        (b'"data_offsets":[0,36]', b'"data_offsets":["",]'),
        (b'"shape":[3,3],"data', b'"shape":[9,1],"data'),
        (b'"dtype":"F32"', b'"dtype":"I32"'),
    ],
)
def test_safetensors_offsets_are_checked(tmp_path, old, new):
    """Offsets outside the data, or a header that contradicts the record, are refused."""
    path = tmp_path / "m.safetensors"
    save(nn.Linear(3, 3, bias=False), path)
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    with pytest.raises(CheckpointError):
        load(path, nn.Linear(3, 3, bias=False))


@both
def test_things_that_are_no_file(tmp_path, suffix):
    """Missing, a folder, a pipe (which must not block), a device, a wrong container: one line with path and reason."""
    path = tmp_path / f"m{suffix}"
    with pytest.raises(CheckpointError, match=rf"m{suffix}: No such file"):
        load(path)
    path.mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        load(path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_metadata(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load(path)
    path.unlink()
    other = tmp_path / f"m{SUFFIXES[1 - SUFFIXES.index(suffix)]}"
    save(net(), other)
    other.rename(path)
    with pytest.raises(CheckpointError):
        load(path, Net())


# Writing


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    """An error or Ctrl-C in the middle: the old content stays, the temporary file goes."""
    path = tmp_path / "report.json"
    path.write_text("old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), atomic_write(path) as file:
            file.write(b"half")
            raise error
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_killed_writer_is_cleaned_up_after(tmp_path):
    """SIGKILL in the middle leaves the old file; the next write removes the remains, but not those of a live writer."""
    path = tmp_path / "m.bin"
    path.write_bytes(b"old")
    code = (
        "import importlib.util, os, signal, sys\n"
        "spec = importlib.util.spec_from_file_location('atomic', sys.argv[1]); m = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(m)\n"
        "with m.atomic_write(sys.argv[2]) as f:\n    f.write(b'half'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    source = Path(sys.modules["quantize.checkpoint.atomic"].__file__)
    assert subprocess.run([sys.executable, "-c", code, source, path]).returncode == -9
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    with atomic_write(path) as outer:
        outer.write(b"outer")
        with atomic_write(path) as inner:
            inner.write(b"inner")
    assert path.read_bytes() == b"outer" and len(list(tmp_path.iterdir())) == 1


def test_written_files_follow_umask_and_links(tmp_path):
    """The mode is what open() would give, and a link stays a link."""
    save(net(), tmp_path / "m.pth")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "m.pth").stat().st_mode) == 0o666 & ~mask
    (tmp_path / "link.pth").symlink_to("m.pth")
    save(nn.Linear(2, 2), tmp_path / "link.pth")
    assert (tmp_path / "link.pth").is_symlink()
    assert read_record(tmp_path / "m.pth")["architecture"]["name"] == "Linear"


@both
def test_folder_that_cannot_be_written(tmp_path, suffix):
    """An OSError that names the file asked for, not the temporary one."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing" / f"m{suffix}", tmp_path / "file" / f"m{suffix}", Path(f"/proc/m{suffix}")):
        with pytest.raises(OSError, match=rf"'{path}'"):
            save(net(), path)
    (tmp_path / f"d{suffix}").mkdir()
    with pytest.raises(IsADirectoryError):
        save(net(), tmp_path / f"d{suffix}")


@both
@pytest.mark.slow
def test_full_disk_leaves_the_old_file(tmp_path, suffix):
    """When the system refuses the bytes, the error is the system's, the old file is whole, nothing else is left."""
    path = tmp_path / f"m{suffix}"
    save(Tiny(TinyConfig()), path)
    code = (
        "import resource, signal, sys, torch\nfrom quantize.checkpoint import save\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "try:\n    save(torch.nn.Linear(500, 500), sys.argv[1])\n"
        "except OSError as error:\n    sys.exit(error.errno)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert result.returncode == 27, result.stderr  # EFBIG: the file-size limit stands in for a full disk
    assert type(load(path)) is Tiny
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
