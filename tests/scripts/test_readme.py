"""The Python in the README and in docs/ runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from helpers import ROOT
from nurseries import time_briefly
from torch import nn

import quantize

pytestmark = [
    pytest.mark.usefixtures("one_nursery"),
    pytest.mark.xdist_group("readme"),  # one folder, so one nursery
]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}


def blocks(page: str) -> list[str]:
    """The Python of a page, with fewer steps of recovery."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    shorter = {"steps=200": "steps=2", "Recover(200)": "Recover(2)", "Recover(160)": "Recover(2)"}
    shorter["minutes=5"] = "minutes=0.02"
    for long, short in shorter.items():
        found = [block.replace(long, short) for block in found]
    return found


class MyNet(nn.Sequential):
    """The reader's own model: images [B, 3, 64, 64] to ten classes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 32, 3, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(1024, 1024),
            nn.ReLU(),
            nn.Linear(1024, 10),
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader works, with two folders of published models."""
    folder = tmp_path_factory.mktemp("reader")
    torch.manual_seed(0)
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))
    bert.save_pretrained(folder / "my_bert")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    llama.save_pretrained(folder / "SmolLM2-135M")
    return folder


@pytest.fixture
def names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the reader has: a class, inputs of a published model, a metric."""
    monkeypatch.chdir(folder)
    time_briefly(monkeypatch)
    torch.manual_seed(0)
    inputs = {"input_ids": torch.arange(32).view(2, 16)}
    return {"MyNet": MyNet, "inputs": inputs, "accuracy": lambda model: {"accuracy": 0.5}}


@pytest.mark.slow
def test_examples_of_the_readme_run(names, capsys):
    """All examples, in order; each gives what the text promises."""
    folder, network, language, cache, recipe, search = blocks("README.md")
    exec(folder, names)
    assert "speedup" in capsys.readouterr().out
    output = names["again"](**names["inputs"]).logits
    assert torch.equal(output, names["small"](**names["inputs"]).logits)
    exec(network, names)
    printed = capsys.readouterr().out
    assert "speedup" in printed and "pruned: " in printed and "int8: " in printed
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(names["again"](image), names["small"](image))
    batches = names["batches"]
    exec(language, names)
    assert names["ids"].shape == (1, 67)
    exec(cache, names)
    assert names["ids"].shape == (1, 19)
    names |= {"model": MyNet().eval(), "batches": batches}
    exec(recipe, names)
    assert "recover: " in capsys.readouterr().out
    assert names["recipe"].name == "pruned+recovered+int8"
    exec(search, names)
    assert names["result"].file.is_file() and names["result"].rows[0]["name"] == "original"


@pytest.mark.slow
def test_examples_of_the_page_for_newcomers_run(names):
    """Each takes the place of what another tool does, on a model that has something for all."""
    batches = [torch.randn(2, 3, 64, 64) for _ in range(2)]
    names |= {
        "quantize": quantize,
        "torch": torch,
        "model": MyNet().eval(),
        "batches": batches,
        "inputs": batches[0],
    }
    for block in blocks("docs/coming_from.md"):
        exec(block, names)
    assert Path("fused.pt").is_file()
    assert names["recipe"].name == "pruned+recovered+int8"
