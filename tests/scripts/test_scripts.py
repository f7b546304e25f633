"""What the scripts write: rows, files, models; what a run that was stopped goes on from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import in_int8
from nurseries import train_briefly

import fusion
import kv_cache
import quantize
import train
from quantize import jobs, training
from quantize.compression.recipe import Int8, Recipe
from quantize.jobs.presets import PRESETS, VARIANTS, recipes

pytestmark = [pytest.mark.usefixtures("one_nursery"), pytest.mark.xdist_group("scripts")]
STEPS = ["--steps", "4", "--threads", "1"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Texts are short and files measured briefly."""
    train_briefly(monkeypatch)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory, one_nursery) -> Path:
    """The folder that a tiny text run wrote."""
    out = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        train_briefly(patch)
        assert train.main(["--preset", "tiny", *STEPS, "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_text_run_reports_every_file(text_run):
    """A row for the baseline and each variant; sizes are those of the files; fp16 halves and int8
    quarters them.
    """
    report = json.loads((text_run / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["fp32", *VARIANTS]
    for row in rows.values():
        assert row["bytes"] == (text_run / row["file"]).stat().st_size
        assert row["latency_ms"]["p10"] <= row["latency_ms"]["median"] <= row["latency_ms"]["p90"]
        assert (
            row["metric"]["name"] == "bits_per_byte"
            and row["load_s"] > 0
            and row["peak_rss_mb"] > 50
        )
    assert rows["fp16"]["bytes_ratio"] <= 0.505 and abs(rows["fp16"]["metric_change"]) < 0.001
    assert rows["int8"]["bytes_ratio"] <= 0.28 and abs(rows["int8"]["metric_change"]) < 0.01
    assert (text_run / "report.md").read_text().count("|") > 20
    assert (text_run / "pareto.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_metric_is_that_of_the_file(text_run):
    """The number in the report is what evaluating the loaded file gives."""
    row = json.loads((text_run / "report.json").read_text())["rows"][0]
    job = jobs.prepare("tiny", out=text_run)
    assert job.evaluate(quantize.load(text_run / "model.pth"))["bits_per_byte"] == pytest.approx(
        row["metric"]["value"], abs=1e-4
    )


@pytest.mark.slow
def test_image_run(tmp_path):
    """The digits train, are compressed in every way, and report accuracy; a resumed run goes
    through again.
    """
    arguments = ["--task", "image", "--preset", "tiny", "--steps", "40", "--threads", "1"]
    arguments += ["--out", str(tmp_path)]
    assert train.main(arguments) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["fp32", *VARIANTS]
    assert not any("failed" in row["notes"] for row in rows)
    assert rows[0]["metric"]["name"] == "accuracy" and rows[0]["metric"]["value"] > 0.5
    assert train.main([*arguments, "--resume", "--variants", "student"]) == 0


@pytest.mark.slow
def test_a_failing_variant_is_a_row(tmp_path, monkeypatch, capsys):
    """Variants that can't be made, saved or read back get a row that says why; the others are
    measured.
    """

    def broken(*_, **__):
        raise RuntimeError("no luck\nat all")

    real = jobs.training.fingerprint

    def digest(model, x):
        return "" if "float16" in quantize.summary(model).done.values() else real(model, x)

    monkeypatch.setattr("quantize.compression.recipe.trained.make_student", broken)
    monkeypatch.setattr("quantize.jobs.training.fingerprint", digest)
    monkeypatch.setattr(Int8, "__call__", lambda *_: torch.jit.ScriptModule())
    names = ["fp16", "bf16", "int8", "student", "student_int8"]
    arguments = ["--task", "image", "--preset", "tiny", "--steps", "1", "--threads", "1"]
    arguments += ["--out", str(tmp_path)]
    assert train.main([*arguments, "--variants", *names]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    assert rows["bf16"]["latency_ms"] and "failed" not in rows["bf16"]["notes"]
    assert rows["student"]["notes"] == "failed: no luck at all" and rows["student"]["bytes"] is None
    assert "student failed: no luck at all" in rows["student_int8"]["notes"]
    assert "doesn't give the bits" in rows["fp16"]["notes"]
    assert "failed" in rows["int8"]["notes"] and "TorchScript" in rows["int8"]["notes"]
    assert "train.py: student failed: no luck at all" in capsys.readouterr().err
    assert "failed: no luck at all" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("task", list(PRESETS))
@pytest.mark.parametrize("preset", ["tiny", "small", pytest.param("base", marks=pytest.mark.slow)])
def test_every_preset_has_a_student(task, preset, tmp_path):
    """The depth that a preset's student keeps can be taken out of its model, which is then
    smaller.
    """
    (tmp_path / "text").write_bytes(b"some text, again and again\n" * 2000)
    data = [tmp_path / "text"] if task == "text" else None
    job = jobs.prepare(preset, task=task, out=tmp_path, paths=data)
    teacher, example = job.build(), job.example[:1]
    if job.preset.depth is not None:
        student = quantize.make_student(teacher, depth=job.preset.depth, example_inputs=example)
        assert sum(p.numel() for p in student.parameters()) < 0.8 * sum(
            p.numel() for p in teacher.parameters()
        )


@pytest.mark.slow
def test_fusion_trains_what_it_needs(tmp_path, monkeypatch):
    """Without a model.pth only the baseline is trained; with one it is fused as it is."""
    assert fusion.main(["--out", str(tmp_path), "--threads", "1", "--batch", "1"]) == 0
    written = {path.name for path in tmp_path.iterdir()}
    assert {
        "model.pth",
        "model_fused.pt",
        "model_fused.json",
        "model_fused.png",
    } <= written and "int8.pth" not in written
    assert not (tmp_path / "report.json").exists()
    monkeypatch.setattr(fusion, "train_baseline", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr("quantize.jobs.fusing.BACKENDS", ("torchscript", "onnxruntime", "openvino"))
    quantize.save(quantize.MLP(quantize.MLPConfig(hidden=(8,))), tmp_path / "mlp.pth")
    options = [
        "--model",
        str(tmp_path / "mlp.pth"),
        "--backend",
        "auto",
        "--batch",
        "1",
        "--threads",
        "1",
    ]
    assert fusion.main([*options, "--out", str(tmp_path / "again")]) == 0


@pytest.mark.slow
def test_kv_cache_trains_what_it_needs_and_takes_every_flag(tmp_path, capsys):
    """The README's command without a model, then each flag that --help shows."""
    out, short_text = (
        ["--out", str(tmp_path), "--threads", "1"],
        ["--max-length", "64", "--max-new-tokens", "4"],
    )
    assert kv_cache.main([*out, *short_text]) == 0
    quantize.save(in_int8(quantize.load(tmp_path / "model.pth")), tmp_path / "int8.pth")
    flags = [
        "--model",
        str(tmp_path / "int8.pth"),
        "--draft",
        str(tmp_path / "model.pth"),
        "--cache",
        "int8",
    ]
    assert (
        kv_cache.main(
            [*out, *short_text, *flags, "--prompt", "def", "--temperature", "0.5", "--seed", "3"]
        )
        == 0
    )
    assert kv_cache.main([*out, *short_text, "--cache", "none"]) == 0


@pytest.mark.slow
def test_resume_ends_with_the_same_weights(tmp_path, text_run, monkeypatch):
    """Stopped in the middle and resumed, the baseline is the uninterrupted run's, bit for bit."""
    arguments = ["--preset", "tiny", *STEPS, "--out", str(tmp_path), "--variants", "fp32"]
    real, calls = training.next_token_loss, 0

    def interrupted(model, batch):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(model, batch)

    monkeypatch.setattr(training, "next_token_loss", interrupted)
    assert train.main(arguments) == 130
    assert not (tmp_path / "model.pth").exists()
    monkeypatch.setattr(training, "next_token_loss", real)
    assert train.main([*arguments, "--resume"]) == 0
    expected = quantize.load(text_run / "model.pth").state_dict()
    for name, tensor in quantize.load(tmp_path / "model.pth").state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
def test_files_hold_the_recipes_that_made_them(text_run):
    """What is read back from a variant's file is the recipe of its row; the baseline has none."""
    preset = PRESETS["text"]["tiny"]
    known = recipes(replace(preset, training=replace(preset.training, steps=4)))
    assert list(known) == list(VARIANTS)
    for name, recipe in known.items():
        metadata = quantize.read_metadata(text_run / f"{name}.pth")
        assert Recipe.from_json(metadata["recipe"]) == recipe and recipe.name == name
    assert quantize.read_metadata(text_run / "model.pth") == {}
    steps = [
        step.technique for step in quantize.summary(text_run / "pruned+recovered+int8.pth").steps
    ]
    assert steps == ["pruned", "recover", "int8"]
