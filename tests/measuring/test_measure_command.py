"""`quantize measure` as a command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from fresh import python
from measuring_models import INPUTS

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
        (["FOLDER"], "is not a file"),
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
