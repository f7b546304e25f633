"""Structure records and configs: repeated on a fresh model, compared with it, bounded before
anything is built.
"""

from __future__ import annotations

import pytest
import torch
from checkpoint_models import IDS, Doubled, Net, Tiny, TinyConfig, assert_same, both, net, rewrite
from torch import nn

from quantize import surgery
from quantize.checkpoint import CheckpointError, load, save
from quantize.models import DecoderConfig, DecoderLM


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@both
def test_structure_record_on_a_foreign_model(tmp_path, suffix):
    """Resized and replaced modules are rebuilt on a fresh instance; the result saves to the same
    bytes again.
    """
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
    assert (
        torch.equal(loaded(IDS), model(IDS))
        and loaded.body.bits == 8
        and loaded.again is loaded.body
    )
    save(loaded, tmp_path / f"again{suffix}")
    assert path.read_bytes() == (tmp_path / f"again{suffix}").read_bytes()


def test_resized_buffer_that_is_not_saved(tmp_path):
    """Refused when saving, not found out when loading."""
    model = net()
    surgery.resize(model, tensors={"shift": torch.zeros(1)}, attributes={})
    with pytest.raises(TypeError, match="shift"):
        save(model, tmp_path / "m.pth")


@both
def test_another_architecture(tmp_path, suffix):
    """Names both classes and the first differences; the model that was passed is untouched."""
    path = tmp_path / f"m{suffix}"
    save(net(), path)
    with pytest.raises(
        CheckpointError,
        match=r"another architecture: .* a Net, the model is a Linear.*and \d+ more",
    ):
        load(path, nn.Linear(2, 2))
    other = Net()
    other.norm = nn.BatchNorm1d(5)
    with pytest.raises(
        CheckpointError,
        match=r"'norm.bias' is torch.float32 \[4\] in the file, torch.float32 \[5\]",
    ):
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
        lambda r: r["structure"].append(
            {"module": "nobody", "builder": "resized", "arguments": {}}
        ),
        lambda r: r["structure"].append(
            {
                "module": "body",
                "builder": "doubled_for_test",
                "arguments": {"shape": [10**6, 10**6], "bits": 1},
            }
        ),
        lambda r: r["structure"].append(
            {
                "module": "body",
                "builder": "resized",
                "arguments": {"shapes": {"weight": [10**9, 10**9]}, "attributes": {}},
            }
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


def decoder() -> DecoderLM:
    return DecoderLM(
        DecoderConfig(vocab_size=64, width=32, layers=2, heads=4, max_length=64)
    ).eval()


@both
@pytest.mark.parametrize(
    ("module", "attributes"),
    [
        ("head", {"out_features": 10**7}),
        ("head", {"in_features": -1}),
        ("head", {"out_features": 10**40}),
        ("head", {"out_features": float("nan")}),
        ("head", {"out_features": True}),
        ("head", {"out_features": 64.0}),
        ("blocks.0.attention.v", {"out_features": 16}),
        ("blocks.0.ffn.gate", {"out_features": 4096}),
        ("embedding", {"num_embeddings": 63}),
        ("norm", {"normalized_shape": [31]}),
    ],
)
def test_attributes_that_contradict_tensors(tmp_path, suffix, module, attributes):
    """What a layer says of its widths is what its tensors have, or the file is refused."""
    path = tmp_path / f"m{suffix}"
    save(decoder(), path)
    edit = {
        "module": module,
        "builder": "resized",
        "arguments": {"shapes": {}, "attributes": attributes},
    }
    rewrite(path, lambda record: record["structure"].append(edit))
    with pytest.raises(CheckpointError, match=rf"m{suffix}: module '{module}'"):
        load(path)


@pytest.mark.parametrize(
    "config",
    [{"layers": 3 * 10**8}, {"head_dim": 10**9}, {"window": 10**40}, {"rope_theta": 10**400}],
)
def test_decoder_configs_that_ask_for_too_much(tmp_path, config):
    """Refused with nothing allocated: the tuples and tables that a config implies are made from the
    tensors' sizes.
    """
    save(decoder(), tmp_path / "m.safetensors")
    rewrite(
        tmp_path / "m.safetensors", lambda record: record["architecture"]["config"].update(config)
    )
    with pytest.raises(CheckpointError):
        load(tmp_path / "m.safetensors")


def test_builder_that_was_dropped(tmp_path):
    """A file that names a builder this version doesn't have says so."""
    save(decoder(), tmp_path / "m.pth")
    edit = {"module": "", "builder": "folded", "arguments": {"inputs": {"shape": [10**9, 64]}}}
    rewrite(tmp_path / "m.pth", lambda record: record["structure"].append(edit))
    with pytest.raises(CheckpointError):
        load(tmp_path / "m.pth")
