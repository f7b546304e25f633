"""The commands of `quantize`: what a newcomer types, and how it is refused."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import measured_by_bytes
from nurseries import train_briefly
from PIL import Image
from torch import nn

import quantize
import train
from quantize import cli
from quantize.commands import doctor
from quantize.compression.recipe import Int8, Recipe
from quantize.jobs.samples import read_samples
from quantize.measuring.rows import Report
from quantize.training.data import DataError

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of transformers: a small BERT classifier, its tokenizer with special tokens."""
    import transformers
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(set(TEXT.replace(".", " .").split()))]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(words), num_attention_heads=2, **sizes)
    path = tmp_path / "bert"
    transformers.BertForSequenceClassification(config).save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def test_every_command_helps(capsys):
    """Each module of the table has a main, and its help shows an example of the command."""
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"  {name}" in shown and command.about in shown
        assert importlib.import_module(command.module).main(["--help"]) == 0
        assert f"quantize {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", "no command given"),
        ("squeeze", "'squeeze'"),
        ("doctor --threads 0", "--threads"),
        ("report NOWHERE", "NOWHERE: no such"),
        ("verify NOWHERE", "NOWHERE"),
        ("verify MODEL --baseline NOWHERE", "NOWHERE"),
        ("generate NOWHERE", "NOWHERE"),
        ("generate MODEL --temperature hot", "--temperature"),
        ("compress MODEL --data TEXT --out OUT", "no budget"),
        ("compress MODEL --data NOWHERE --out OUT --speedup 2", "NOWHERE: no such file"),
        ("compress NOWHERE --data TEXT --out OUT --speedup 2", "NOWHERE"),
        ("compress MODEL --data TEXT --out MODEL --speedup 2", "not a folder"),
        ("compress MODEL --data TEXT --out . --speedup 2", "isn't empty"),
        ("compress MODEL --data TEXT --out OUT --bytes many", "--bytes"),
        ("compress MODEL --data TEXT --out OUT --max-loss lots", "max_loss"),
        ("compress MODEL --data TEXT --out OUT --speedup 2 --model json:none", "json:none"),
        ("compress MODEL --data TEXT --out OUT --speedup 2 --evaluate no:way", "no:way"),
        ("compress MODEL --data SHORT --out OUT --speedup 2", "give more text"),
    ],
)
def test_mistakes_are_one_line(line, told, decoder, tmp_path, monkeypatch, capsys):
    """Exit code 2, one line that names what is wrong, and nothing written."""
    monkeypatch.chdir(tmp_path)
    Path("TEXT").write_text(TEXT)
    Path("SHORT").write_text("short")
    before = sorted(tmp_path.iterdir())
    arguments = [str(decoder) if word == "MODEL" else word for word in line.split()]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("quantize") and error.count("\n") == 1 and told in error
    assert sorted(tmp_path.iterdir()) == before


def test_doctor_gives_facts_as_json(capsys):
    """The same facts for machines; text for people names the compiler and the levels."""
    assert cli.main(["doctor", "--json", "--threads", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["threads"] == 1 and "generic" in found["native"]
    assert cli.main(["doctor", "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert found["machine"]["cpu"] in shown and (found["compiler"] or "none") in shown
    assert all(f"{name}: {origin}" in shown for name, origin in found["kernels"].items())


def test_advice_names_what_is_missing():
    """Without a compiler, without int8 instructions, with too many threads: a line each."""
    kernels = {"kernels": {"int8": f"{doctor.MISSING} (no C++ compiler)"}}
    found = doctor.facts() | {"compiler": None, "quota": 0.5} | kernels
    found["machine"] |= {"instruction_sets": {"AVX2": True}, "usable_cores": 1, "threads": 8}
    lines = " ".join(doctor.advice(found))
    for word in ("C++ compiler", "int8", "OMP_NUM_THREADS=1", "quota"):
        assert word in lines


def test_generate_continues_the_prompt(decoder, capsys):
    """Greedy bytes of a file: those of `quantize.generate`."""
    line = ["generate", str(decoder), "--prompt", "The ", "--max-new-tokens", "8", "--threads", "1"]
    assert cli.main(line) == 0
    shown = capsys.readouterr().out
    prompt = torch.tensor([list(b"The ")])
    ids = quantize.generate(quantize.open_model(decoder), prompt, max_new_tokens=8, cache=False)
    expected = bytes(ids[0].tolist()).decode(errors="replace")
    assert shown.startswith(expected[:6]) and "8 written" in shown


def test_text_goes_through_the_folders_tokenizer(folder, tmp_path):
    """Each window is as long as asked for, with the special tokens at its ends, and runs."""
    (tmp_path / "a.txt").write_text(TEXT)
    model = quantize.open_model(folder)
    batches = read_samples([tmp_path / "a.txt"], model, folder, batch=2, length=16)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert ids.shape[1] == 16 and len(batches) > 4
    assert (ids[:, 0] == 2).all() and (ids[:, -1] == 3).all() and (ids[:, 1:-1] > 3).all()
    assert model(**batches[0]).logits.shape == (2, 2)
    (folder / "tokenizer.json").unlink()
    model.resize_token_embeddings(1000)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        read_samples([tmp_path / "a.txt"], model, folder)


def test_images_are_cropped_and_scaled(tmp_path):
    """The middle of a picture, with the mean and deviation of the folder; grey for one channel."""
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = 255
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    size = {"height": 4, "width": 4}
    settings = {"size": size, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(settings))
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    (batch,) = read_samples(files, nn.Conv2d(3, 2, 3), tmp_path / "model", batch=2)
    assert torch.equal(batch, torch.full((2, 3, 4, 4), 2.0))
    (batch,) = read_samples(files, nn.Conv2d(1, 2, 3), tmp_path, batch=2, image_size=4)
    assert torch.equal(batch, torch.ones(2, 1, 4, 4))


def test_arrays_are_split_into_batches(tmp_path):
    """Named arrays are keyword arguments; the last, short batch is dropped."""
    x = np.arange(14, dtype=np.float32).reshape(7, 2)
    np.savez(tmp_path / "x.npz", x=x, y=x + 1)
    np.save(tmp_path / "x.npy", x)
    batches = read_samples([tmp_path / "x.npz"], nn.Linear(2, 1), tmp_path, batch=3)
    assert len(batches) == 2 and torch.equal(batches[1]["y"], torch.tensor(x[3:6] + 1))
    batches = read_samples([tmp_path / "x.npy"], nn.Linear(2, 1), tmp_path, batch=3, batches=1)
    assert len(batches) == 1 and torch.equal(batches[0], torch.tensor(x[:3]))
    np.savez(tmp_path / "bad.npz", x=x, y=x[:3])
    (tmp_path / "broken.npy").write_bytes(b"no array")
    for name in ("bad.npz", "broken.npy"):
        with pytest.raises(DataError, match=name):
            read_samples([tmp_path / name], nn.Linear(2, 1), tmp_path)
    with pytest.raises(DataError, match="arrays and images"):
        (tmp_path / "a.png").touch()
        read_samples([tmp_path / "x.npy", tmp_path / "a.png"], nn.Linear(2, 1), tmp_path)


@pytest.fixture
def by_bytes(monkeypatch):
    """Searches of a few points that start no processes and measure by bytes."""
    monkeypatch.setattr("quantize.compression.search.trial.compare", measured_by_bytes)
    monkeypatch.setattr("quantize.compression.search.finding.Nursery.launch", lambda _: None)
    for limit in ("MOST_SHARES", "ROUNDS", "TRAINED"):
        monkeypatch.setattr(f"quantize.compression.search.walk.{limit}", 1)
    monkeypatch.setattr("quantize.compression.search.choosing.CANDIDATES", 1)


def read(path: Path) -> Report:
    return json.loads((path / "report.json").read_text())


@pytest.mark.slow
def test_a_folder_is_compressed_and_opens_in_one_line(folder, tmp_path, by_bytes, faster, capsys):
    """The table of this model, a folder that `open_model` opens with its tokenizer, the report."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(TEXT)
    out = tmp_path / "small"
    line = ["compress", folder, "--data", tmp_path / "texts", "--bytes", "60k", "--out", out]
    line += ["--length", 16, "--batch", 2, "--batches", 4, "--minutes", 5, "--threads", 1]
    assert cli.main([str(word) for word in line]) == 0
    shown = capsys.readouterr().out
    assert "original" in shown and "keeps the budget" in shown and "open_model" in shown
    model = quantize.open_model(out)
    weights = out / "quantize.safetensors"
    assert weights.stat().st_size <= 60_000 and (out / "tokenizer.json").is_file()
    assert model(torch.randint(4, 10, (2, 16))).logits.shape == (2, 2)
    rows = read(out)["rows"]
    assert rows[0]["name"] == "original"
    (row,) = [row for row in rows if row["file"]]
    assert row["bytes"] == weights.stat().st_size and row["file"] == weights.name
    assert cli.main(["verify", str(out), "--threads", "1"]) == 0  # the search knows the rest
    told = capsys.readouterr().out
    loss = f"{row['metric']['value']:.4g}"
    assert told.count(" holds: ") == 4 and f"is {loss} here, the report says {loss}" in told


@pytest.mark.slow
@pytest.mark.usefixtures("no_chart")
def test_a_python_file_makes_the_model(tmp_path, by_bytes, monkeypatch, capsys):
    """`model = ...` in a file; a class of one's own is named with --model for its weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    source = "from torch import nn\n\n\nclass Net(nn.Sequential):\n    def __init__(self):\n"
    source += "        super().__init__(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))\n\n\n"
    Path("mynet.py").write_text(source + "model = Net\n")
    np.save("x.npy", np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32))
    rest = "--data x.npy --bytes 4200 --minutes 5 --threads 1".split()
    assert cli.main(["compress", "mynet.py", "--out", "small", *rest]) == 0
    assert "model=a fresh instance" in capsys.readouterr().out
    net = importlib.import_module("mynet").Net
    assert quantize.open_model("small", net())(torch.ones(1, 16)).shape == (1, 4)
    assert cli.main(["compress", "small", "--out", "again", *rest]) == 2
    assert "model=" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.xdist_group("scripts")
@pytest.mark.usefixtures("one_nursery")
def test_train_adds_what_compress_finds_as_a_row(tmp_path, monkeypatch):
    """`--budget` reaches the search; its model is measured beside the others, with its recipe and
    what each layer got.
    """
    asked = {}

    def found(model, _inputs, **options):
        asked.update(options)
        recipe = Recipe((Int8(embeddings=True),))
        small, file = recipe(model), options["out"] / "int8.pth"
        options["out"].mkdir()
        quantize.save(small, file, metadata={"recipe": recipe.as_values()})
        return quantize.Result(small, file, [], True, "", [{"name": "a", "got": "b", "why": "c"}])

    train_briefly(monkeypatch)
    monkeypatch.setattr("quantize.jobs.choosing.compress", found)
    line = "--preset tiny --steps 2 --variants fp16 --budget bytes=4e5 max_loss=5% --threads 1"
    assert train.main([*line.split(), "--out", str(tmp_path)]) == 0
    assert asked["budget"] == {"bytes": 4e5, "max_loss": "5%"} and len(asked["calibration"]) == 8
    report = read(tmp_path)
    row = report["rows"][-1]
    assert (row["name"], row["file"]) == ("auto", "auto.pth") and "int8" in row["notes"]
    assert row["bytes"] == (tmp_path / "auto.pth").stat().st_size
    assert quantize.read_metadata(tmp_path / "auto.pth")["recipe"][0]["step"] == "Int8"
    assert report["data"]["layers"][0]["why"] == "c"
