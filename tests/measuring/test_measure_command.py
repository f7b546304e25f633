"""`quantize measure` as a command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from fresh import python
from helpers import assert_close
from measuring_models import INPUTS

import quantize
from quantize.measuring import command
from quantize.measuring.artifact import fingerprint


@pytest.mark.slow
@pytest.mark.xdist_group("fresh")
def test_command_line_prints_one_json_line(files, tmp_path):
    """Standard output is one line of JSON, standard error is empty (no double import, no warnings),
    and the numbers agree.
    """
    np.save(tmp_path / "x.npy", INPUTS.numpy())
    options = "--threads 1 --rounds 1 --burst-seconds 0 --inputs".split()
    options += [tmp_path / "x.npy"]
    result = python("-m", "quantize", "measure", files["mlp"], *options)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("\n") == 1
    line = json.loads(result.stdout)
    assert line["bytes"] == files["mlp"].stat().st_size and line["latency_ms"]["median"] > 0
    assert line["machine"]["threads"] == 1 and line["peak_rss_mb"] > 50
    assert line["output_sha256"] == fingerprint(files["model"], INPUTS)


@pytest.mark.slow
@pytest.mark.xdist_group("fresh")
def test_command_line_names_a_missing_file(tmp_path):
    """Exit code 2, nothing on standard output, one line on standard error."""
    result = python("-m", "quantize", "measure", tmp_path / "none.pth")
    assert (result.returncode, result.stdout) == (2, "")
    reason = f"{tmp_path / 'none.pth'}: no such file"
    assert result.stderr == f"quantize measure: error: {reason}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["FOLDER"], "holds neither quantize.safetensors nor config.json"),
        (["GARBAGE"], "garbage.pth"),
        (["FILE", "--threads", "0"], "threads is 0; allowed"),
        (["FILE", "--rounds", "many"], "--rounds"),
        (["FILE", "--evaluate", "nowhere:f"], "nowhere:f"),
        (["FILE", "--inputs", "x.txt"], "x.txt"),
        (["FILE", "--inputs", "none.npy"], "none.npy"),
        ([], "required: file"),
    ],
)
def test_mistakes_on_the_command_line(files, tmp_path, capsys, arguments, message):
    """One line each, exit code 2."""
    from quantize.measuring.command import main

    (tmp_path / "garbage.pth").write_bytes(b"PK\x03\x04 not a checkpoint")
    places = {
        "FOLDER": str(tmp_path),
        "FILE": str(files["mlp"]),
        "GARBAGE": str(tmp_path / "garbage.pth"),
    }
    code = main([places.get(a, a) for a in arguments])
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err


def test_a_folder_is_measured_by_its_file(tmp_path):
    """The folder, or the file in it, of a model that the config beside it builds; one of
    transformers as it was opened.
    """
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=64, num_attention_heads=2, **sizes)
    bert = transformers.BertModel(config).eval()
    bert.save_pretrained(tmp_path / "bert")
    small = quantize.quantize_dynamic(bert, prefer="size", embeddings=True)
    quantize.save_folder(small, tmp_path / "small")
    ids = torch.arange(8)[None]
    opened = command._of_folder(tmp_path / "bert")
    assert type(opened[0]) is type(bert) and opened[1] is None
    file = tmp_path / "small" / "quantize.safetensors"
    for path in (file, file.parent):
        source, fresh = command._of_folder(path)
        assert source == file
        assert_close(quantize.load(source, fresh)(ids)[0], small(ids)[0])
    assert command._of_folder(tmp_path / "net.pth") == (tmp_path / "net.pth", None)
