"""`open_model` and `save_folder`: what comes out is what went in, and nothing runs on the way."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from helpers import in_int8
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import quantize
from quantize import CheckpointError, open_model, save_folder

IDS = torch.arange(16).view(2, 8)
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
LLAMA = {"num_key_value_heads": 2, "max_position_embeddings": 64}


class Net(nn.Module):
    """Shared weights, a running mean, a buffer that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Sequential(nn.ReLU(), nn.Linear(8, 4))
        self.again = self.last[1]
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x))) * self.scale


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    model(torch.randn(32, 4))  # moves the running statistics
    return model.eval()


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES)
    return transformers.BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def published(bert, tmp_path_factory) -> Path:
    """A folder as transformers writes it, with a tokenizer."""
    folder = tmp_path_factory.mktemp("published")
    bert.save_pretrained(folder)
    (folder / "vocab.txt").write_text("a\nb\n")
    return folder


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        answer = model(ids)
    return answer if torch.is_tensor(answer) else answer.logits


def half_of_the_ffn(model: nn.Module) -> nn.Module:
    amount = {"*.intermediate.dense": 0.5}
    return quantize.prune_ln_structured(model, {"input_ids": IDS}, amount=amount)


COMPRESSIONS = {
    "as it is": lambda m: m,
    "half": quantize.to_half,
    "int8": in_int8,
    "int4": quantize.quantize_weights,
    "low rank": lambda m: quantize.factorize_low_rank(m, ratio=0.7),
    "pruned": half_of_the_ffn,
    "pruned, heads too": lambda m: quantize.prune_ln_structured(m, {"input_ids": IDS}, amount=0.5),
    "pruned and int8": lambda m: in_int8(half_of_the_ffn(m)),
}
KNOWN_TO_TRANSFORMERS = {"as it is", "half", "pruned"}


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_folder_gives_the_model_back(name, published, tmp_path):
    """Opened, compressed, written, opened: the same bits, with the tokenizer; transformers reads
    the folder as the same model, or not at all.
    """
    small = COMPRESSIONS[name](open_model(published))
    save_folder(small, tmp_path / "small")
    again = open_model(tmp_path / "small")
    assert type(again) is type(small) and not again.training
    assert torch.equal(logits(again), logits(small))
    assert (tmp_path / "small" / "vocab.txt").read_text() == "a\nb\n"
    steps = json.loads((tmp_path / "small" / "quantize.json").read_text())["steps"]
    assert [step["technique"] for step in steps] == [
        step.technique for step in quantize.summary(small).steps
    ]
    theirs = transformers.BertForSequenceClassification
    if name in KNOWN_TO_TRANSFORMERS:
        assert torch.equal(logits(theirs.from_pretrained(tmp_path / "small").eval()), logits(small))
    else:
        with pytest.raises(OSError):
            theirs.from_pretrained(tmp_path / "small")
        assert str(quantize.summary(tmp_path / "small")) == str(quantize.summary(small))


def test_the_llama_family_becomes_our_decoder(tmp_path):
    """The same logits as transformers'; compressed it opens again by itself."""
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **LLAMA)).eval()
    theirs.save_pretrained(tmp_path / "llama", max_shard_size="40KB")
    (tmp_path / "llama" / "tokenizer.json").write_text("{}")
    ours = open_model(tmp_path / "llama")
    assert type(ours) is quantize.DecoderLM
    torch.testing.assert_close(logits(ours), logits(theirs))
    small = in_int8(ours)
    save_folder(small, tmp_path / "small")
    assert torch.equal(logits(open_model(tmp_path / "small")), logits(small))
    assert (tmp_path / "small" / "tokenizer.json").read_text() == "{}"


def test_a_llama_that_asks_for_more_is_theirs(tmp_path):
    """What DecoderLM doesn't compute (a bias in attention) is left to transformers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, **LLAMA, attention_bias=True)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    opened = open_model(tmp_path)
    assert type(opened) is transformers.LlamaForCausalLM
    assert torch.equal(logits(opened), logits(theirs))


def test_without_transformers_other_families_are_refused(published, monkeypatch):
    """The line says what is missing."""
    monkeypatch.setattr("quantize.models.opening._transformers", lambda: None)
    with pytest.raises(CheckpointError, match="'bert' needs transformers"):
        open_model(published)


def test_missing_weights_are_no_random_numbers(published, tmp_path):
    """A folder that lacks a tensor, or has one of another shape, is refused with its name."""
    for file in published.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    name = "bert.pooler.dense.weight"
    whole = weights.pop(name)
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"'{name}' are missing"):
        open_model(tmp_path)
    weights[name] = whole[:3].clone()
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'bert.pooler.dense.weight' has shape"):
        open_model(tmp_path)


WRITERS = {
    "module.pt": torch.save,
    "state.pth": lambda m, path: torch.save(m.state_dict(), path),
    "nested.pt": lambda m, path: torch.save({"epoch": 3, "state_dict": m.state_dict()}, path),
    "shared.pth": lambda m, path: torch.save(dict(m.state_dict()), path),
    "ours.pth": quantize.save,
    "ours.safetensors": quantize.save,
}


@pytest.mark.parametrize("name", WRITERS)
def test_files_of_all_kinds_fill_a_fresh_instance(name, net, tmp_path):
    """The same outputs as the model that was saved; the instance stays as it is; without one, the
    line says how to pass one.
    """
    WRITERS[name](net, tmp_path / name)
    fresh = Net()
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    opened = open_model(tmp_path / name, fresh)
    x = torch.randn(5, 4)
    assert torch.equal(opened(x), net(x)) and not opened.training
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())
    with pytest.raises(CheckpointError, match="model="):
        open_model(tmp_path / name)
    with pytest.raises(CheckpointError, match="Linear"):
        open_model(tmp_path / name, nn.Linear(2, 2))


def test_plain_safetensors_fill_a_fresh_instance(tmp_path):
    layer = nn.Linear(3, 2)
    safetensors.torch.save_file(layer.state_dict(), tmp_path / "plain.safetensors")
    opened = open_model(tmp_path / "plain.safetensors", nn.Linear(3, 2))
    assert torch.equal(opened.weight, layer.weight) and torch.equal(opened.bias, layer.bias)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("where", ["alone", "in a dict", "in a module"])
def test_no_code_of_a_file_runs(where, tmp_path):
    """What a pickle calls becomes a stand-in; the rest of a module is still there."""
    evil = Evil(tmp_path / "ran")
    module = nn.Linear(2, 2)
    module.evil = evil
    content = {"alone": evil, "in a dict": {"a": evil}, "in a module": module}[where]
    torch.save(content, tmp_path / "file.pt")
    if where == "in a module":
        opened = open_model(tmp_path / "file.pt", nn.Linear(2, 2))
        assert torch.equal(opened.weight, module.weight)
    else:
        with pytest.raises(CheckpointError):
            open_model(tmp_path / "file.pt", nn.Linear(2, 2))
    assert not (tmp_path / "ran").exists()


class Bomb:
    """Copies one tuple over and over: quadratic in the file's length."""

    def __reduce__(self):
        return torch.Size, (BIG,)


BIG = tuple(range(10**6))


class Wide:
    """A tensor of 10^12 numbers over a storage of one."""

    def __reduce__(self):
        storage = torch.zeros(1).untyped_storage()
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32)
        return torch._utils._rebuild_tensor_v2, (typed, 0, (10**12,), (0,), False, {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [({str(i): Bomb() for i in range(100)}, "far more"), ({"a": Wide()}, "numbers in 1")],
)
def test_a_short_file_asks_for_no_more_memory_than_it_has(content, message, tmp_path):
    """Refused before it is built."""
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=message):
        open_model(tmp_path / "file.pt", nn.Linear(2, 2))


@given(data=st.data())
@settings(max_examples=200)
def test_damage_is_a_checkpoint_error_or_harmless(data, tmp_path_factory):
    """Any byte of a pickled module may be anything: one kind of error, or a model of its class."""
    folder = tmp_path_factory.getbasetemp()
    path = folder / "damaged.pt"
    whole = folder / "whole.pt"
    if not whole.exists():
        torch.save(nn.Linear(2, 2), whole)
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        opened = open_model(path, nn.Linear(2, 2))
    except CheckpointError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert type(opened) is nn.Linear


def test_what_is_no_model_is_named(tmp_path, net):
    """Nothing there, an empty folder, a bare pickle, TorchScript, a module of another class."""
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_model(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"neither quantize.safetensors nor"):
        open_model(tmp_path)
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match=r"bare.pkl"):
        open_model(tmp_path / "bare.pkl", net)
    with pytest.raises(TypeError, match="fresh instance"):
        open_model(tmp_path / "bare.pkl", Net)


def test_a_foreign_class_needs_an_instance(net, tmp_path):
    """A folder of a class that nobody can build says so, and opens with an instance."""
    save_folder(in_int8(net), tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"pass model=, a fresh instance \(Net\(\)\)"):
        open_model(tmp_path / "small")
    x = torch.randn(5, 4)
    opened = open_model(tmp_path / "small", Net())
    assert torch.equal(opened(x), in_int8(net)(x))


def test_other_folders_are_not_replaced(net, tmp_path):
    """Only what save_folder wrote, or an empty folder, gives way."""
    target = tmp_path / "mine"
    target.mkdir()
    save_folder(net, target)
    save_folder(net, target)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="isn't empty"):
        save_folder(net, other)
    with pytest.raises(ValueError, match="not a folder"):
        save_folder(net, other / "thesis.txt")
    assert (other / "thesis.txt").read_text() == "years of work"


def test_a_failure_leaves_the_old_folder(net, tmp_path, monkeypatch):
    """Whatever fails while the new one is written, the old one stays and nothing else is left."""
    target = tmp_path / "mine"
    save_folder(net, target)
    before = (target / "quantize.safetensors").read_bytes()
    for place in ("_copy_tokenizer", "_flush", "checkpoint.save"):
        with monkeypatch.context() as patch:
            patch.setattr(f"quantize.models.opening.{place}", _fail)
            with pytest.raises(OSError, match="disk"):
                save_folder(in_int8(net), target)
        assert (target / "quantize.safetensors").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def _fail(*_args: object, **_kwargs: object) -> None:
    raise OSError(28, "no room on the disk")
