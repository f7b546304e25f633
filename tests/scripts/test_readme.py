"""The Python in the README runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

BLOCKS = re.findall(
    r"```python\n(.*?)```", Path(__file__).parents[2].joinpath("README.md").read_text(), re.DOTALL
)


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
            nn.Linear(1024, 10),
        )


@pytest.mark.slow
def test_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All examples, in order, with fewer steps of recovery; the last line of each gives what the
    text promises.
    """
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"MyNet": MyNet}
    first, second, recipe = BLOCKS
    assert "steps=200" in first and "Recover(200)" in recipe
    exec(first.replace("steps=200", "steps=2"), names)
    assert "speedup" in capsys.readouterr().out and (tmp_path / "small.safetensors").exists()
    exec(second, names)
    assert names["ids"].shape == (1, 19)
    exec(recipe.replace("Recover(200)", "Recover(2)"), names)
    assert "recover: " in capsys.readouterr().out
    assert names["recipe"].name == "pruned+recovered+int8"
