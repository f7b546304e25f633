"""The scripts as a user runs them: what they write, what they say, and how they fail."""

import json
from pathlib import Path

import pytest
import torch

import quantize
import train


@pytest.fixture(scope="module")
def text_run(tmp_path_factory) -> Path:
    """The folder that a tiny text run wrote."""
    out = tmp_path_factory.mktemp("text")
    assert train.main(["--preset", "tiny", "--steps", "12", "--threads", "1", "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_text_run_reports_every_file(text_run):
    """A row for the baseline and each variant; sizes are those of the files; fp16 halves and int8 quarters them."""
    report = json.loads((text_run / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["fp32", *train.VARIANTS]
    for row in rows.values():
        assert row["bytes"] == (text_run / row["file"]).stat().st_size
        assert row["latency_ms"]["p10"] <= row["latency_ms"]["median"] <= row["latency_ms"]["p90"]
        assert row["metric"]["name"] == "bits_per_byte" and row["load_s"] > 0 and row["peak_rss_mb"] > 50
    assert rows["fp16"]["bytes_ratio"] <= 0.505 and abs(rows["fp16"]["metric_change"]) < 0.001
    assert rows["int8"]["bytes_ratio"] <= 0.28 and abs(rows["int8"]["metric_change"]) < 0.01
    assert (text_run / "report.md").read_text().count("|") > 20
    assert (text_run / "pareto.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_metric_is_that_of_the_file(text_run):
    """The number in the report is what evaluating the loaded file gives."""
    row = json.loads((text_run / "report.json").read_text())["rows"][0]
    job = train.prepare(train.parse(["--preset", "tiny", "--out", str(text_run)]))
    assert job.evaluate(quantize.load(text_run / "model.pth"))["bits_per_byte"] == pytest.approx(
        row["metric"]["value"], abs=1e-4
    )


@pytest.mark.slow
def test_image_run(tmp_path):
    """The digits train, compress and report accuracy; only the variants asked for are made."""
    arguments = ["--task", "image", "--preset", "tiny", "--variants", "fp16", "--threads", "1", "--out", str(tmp_path)]
    assert train.main(arguments) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["fp32", "fp16"]
    assert rows[0]["metric"]["name"] == "accuracy" and rows[0]["metric"]["value"] > 0.9
    assert not (tmp_path / "int8.pth").exists()


@pytest.mark.slow
def test_resume_ends_with_the_same_weights(tmp_path, text_run, monkeypatch):
    """Stopped in the middle and resumed, the baseline is the uninterrupted run's, bit for bit."""
    arguments = ["--preset", "tiny", "--steps", "12", "--threads", "1", "--out", str(tmp_path), "--variants", "fp32"]
    real, calls = train.training.next_token_loss, 0

    def interrupted(model, batch):
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return real(model, batch)

    monkeypatch.setattr(train.training, "next_token_loss", interrupted)
    assert train.main(arguments) == 130
    assert not (tmp_path / "model.pth").exists()
    monkeypatch.undo()
    assert train.main([*arguments, "--resume"]) == 0
    expected = quantize.load(text_run / "model.pth").state_dict()
    for name, tensor in quantize.load(tmp_path / "model.pth").state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_user_mistakes_are_one_line(tmp_path, capsys):
    """Missing, empty, short and unusable data, a folder that can't be written: exit code 2, one line, nothing written."""
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "binary").write_bytes(b"\0\1")
    (tmp_path / "file").touch()
    out = tmp_path / "out"
    for arguments in (
        ["--data", "missing.txt"],
        ["--data", "empty.txt"],
        ["--data", "short.txt"],
        ["--data", "folder"],
        ["--task", "image", "--data", "folder"],
        ["--out", "file"],
        ["--out", "file/inside"],
    ):
        paths = [str(tmp_path / a) if a in ("missing.txt", "empty.txt", "short.txt", "folder") else a for a in arguments]
        paths = [str(tmp_path / a) if a.startswith("file") else a for a in paths]
        where = [] if "--out" in arguments else ["--out", str(out)]
        assert train.main(["--preset", "tiny", *paths, *where]) == 2, arguments
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("train.py: error: "), lines
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--preset", "huge"], ["--task", "sound"], ["--steps", "0"], ["--threads", "-1"], ["--seed", "-1"],
        ["--variants", "int9"], ["--device", "tpu"], ["--task", "image", "--data", "a", "b"], ["--unknown"],
    ],
)  # fmt: skip
def test_flags_out_of_range(arguments, capsys):
    """A flag out of range exits with code 2 and names the flag."""
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == 2
    flag = "--data" if "--data" in arguments else arguments[0]
    assert flag in capsys.readouterr().err


def test_resume_of_another_run_is_refused(tmp_path, capsys):
    """A training state of another architecture: one line, and the file stays as it is."""
    arguments = ["--preset", "tiny", "--steps", "1", "--threads", "1", "--out", str(tmp_path), "--variants", "fp32"]
    train.prepare(train.parse(arguments)).train()
    before = (tmp_path / "fp32.state").read_bytes()
    capsys.readouterr()
    assert train.main(["--task", "image", "--preset", "tiny", "--out", str(tmp_path), "--resume"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1 and "another run" in error[0]
    assert (tmp_path / "fp32.state").read_bytes() == before


def test_help_shows_defaults(capsys):
    """`--help` runs without doing anything and shows every default."""
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "(default: small)" in text and "(default: artifacts)" in text and "uv run python train.py" in text
