"""kv_cache.py on a file: what it shows and writes, and how it names mistakes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from helpers import decoder

from quantize.checkpoint import save


@pytest.fixture
def script(monkeypatch):
    """The script `kv_cache.py` as a module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))
    return importlib.import_module("kv_cache")


@pytest.mark.slow
def test_the_script_shows_a_file(script, tmp_path, capsys):
    """The script streams the prompt's continuation, prints its tables and writes the plot and the
    numbers.
    """
    save(decoder(vocab_size=256, max_length=96), tmp_path / "model.pth")
    assert script.main(["--out", str(tmp_path), "--prompt", "def f(", "--max-new-tokens", "8"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("def f(") and "int8 cache" in shown and "all 64 of 64" in shown
    result = json.loads((tmp_path / "kv_cache.json").read_text())
    assert {row["way"] for row in result["rows"]} >= {
        "no cache",
        "cache",
        "int8 cache",
        "cache + speculative",
    }
    assert all(
        check["same_tokens"] == check["of"]
        for check in result["checks"]
        if check["way"] != "int8 cache"
    )
    assert (tmp_path / "kv_cache.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere.pth"], "nowhere.pth"),
        (["--prompt", ""], "prompt"),
        (["--max-new-tokens", "1000"], "pass the limit of 96"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--draft", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_the_script_names_mistakes_in_one_line(script, arguments, message, tmp_path, capsys):
    """A user's mistake is one line on standard error and exit code 2."""
    save(decoder(vocab_size=256, max_length=96), tmp_path / "model.pth")
    assert script.main(["--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kv_cache.py: error: ") and message in error and error.count("\n") == 1
