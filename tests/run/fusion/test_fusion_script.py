"""fusion.py on a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from fusion_models import randomized
from helpers import assert_close, call, first_tensor
from nurseries import time_briefly

import quantize
from quantize.run.fusion import torchscript

pytestmark = [
    pytest.mark.usefixtures("no_clock", "one_nursery"),
    pytest.mark.filterwarnings(
        "error:.*torch.jit.*:FutureWarning", "error:.*torch.jit.*:DeprecationWarning"
    ),
]


# The script.
def test_script_reports_a_mistake_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing file, a broken one and a flag out of range: one line, exit code 2, nothing
    written.
    """
    import fusion

    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no checkpoint")
    out = tmp_path / "out"
    for flags in (
        ["--model", str(tmp_path / "none.pth")],
        ["--model", str(broken)],
        ["--batch", "0"],
        ["--backend", "x"],
    ):
        assert fusion.main([*flags, "--out", str(out)]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and captured.err.startswith("fusion.py: ")
    assert not out.exists()


@pytest.mark.slow
def test_script_fuses_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script writes the fused file, its numbers and a chart, and what it prints is what it
    measured.
    """
    import json

    import fusion

    time_briefly(monkeypatch)
    model = randomized(quantize.ConvNet(quantize.ConvNetConfig(widths=(8, 16))))
    quantize.save(model, tmp_path / "model.pth")
    assert fusion.main(["--out", str(tmp_path), "--batch", "2"]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        "model.pth",
        "model_fused.pt",
        "model_fused.json",
        "model_fused.png",
    }
    report = json.loads((tmp_path / "model_fused.json").read_text())
    assert report["kernel_calls"]["fused"] < report["kernel_calls"]["eager"]
    assert max(report["difference"].values()) <= 1e-5
    x = model.example_inputs(2)
    assert_close(
        torchscript.load(str(tmp_path / "model_fused.pt"))(x), first_tensor(call(model, x))
    )
    assert "BatchNorm layers and channel scales folded" in capsys.readouterr().out
