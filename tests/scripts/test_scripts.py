"""The scripts as a user runs them: what they write, what they say, and how they fail."""

import ast
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fusion
import kv_cache
import quantize
import train
from quantize import jobs, script, training
from quantize.compression.recipe import Recipe
from quantize.jobs.presets import PRESETS, VARIANTS, recipes

ROOT = Path(__file__).parents[2]


one_worker = pytest.mark.xdist_group("text run")  # those who read the folder of `text_run`


def quick(patch: pytest.MonkeyPatch) -> None:
    """Let the tiny presets time each file once."""
    for presets in PRESETS.values():
        patch.setitem(presets, "tiny", replace(presets["tiny"], rounds=1))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Files are measured briefly."""
    quick(monkeypatch)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory) -> Path:
    """The folder that a tiny text run wrote."""
    out = tmp_path_factory.mktemp("text")
    arguments = ["--preset", "tiny", "--steps", "12", "--threads", "1", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        assert train.main(arguments) == 0
    return out


@one_worker
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


@one_worker
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
    arguments = [
        "--task",
        "image",
        "--preset",
        "tiny",
        "--steps",
        "40",
        "--threads",
        "1",
        "--out",
        str(tmp_path),
    ]
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
    monkeypatch.setattr(
        "quantize.compression.recipe.steps.quantize_dynamic",
        lambda *_, **__: torch.jit.ScriptModule(),
    )
    names = ["fp16", "bf16", "int8", "student", "student_int8"]
    arguments = [
        "--task",
        "image",
        "--preset",
        "tiny",
        "--steps",
        "1",
        "--threads",
        "1",
        "--out",
        str(tmp_path),
    ]
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
@pytest.mark.parametrize("preset", ["tiny", "small", "base"])
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


def test_many_ranks_prepare_the_same_folder(tmp_path):
    """Processes that check one folder at the same time don't get into each other's way."""
    out = tmp_path / "out"
    with ThreadPoolExecutor(16) as pool:
        prepared = pool.map(lambda _: jobs.prepare("tiny", task="image", out=out), range(48))
        assert len(list(prepared)) == 48
    assert list((tmp_path / "out").iterdir()) == []


def command(*arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_ranks_train_and_report(tmp_path):
    """The README's torchrun line, twice into one folder: the same weights each time."""
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "train.py",
        "--threads",
        "1",
    ]
    options = [
        "--task",
        "image",
        "--preset",
        "tiny",
        "--steps",
        "2",
        "--variants",
        "fp32",
        "--out",
        str(tmp_path),
    ]
    digests = set()
    for _ in range(2):
        process = command(*launcher, *options)
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        digests.add(str(quantize.load(tmp_path / "model.pth").state_dict()))
    assert len(digests) == 1


@pytest.mark.slow
def test_ctrl_c_leaves_whole_files_and_says_how_to_go_on(tmp_path):
    """Exit code 130, one line that names --resume, only a whole training state in the folder."""
    process = command(
        "train.py",
        "--task",
        "image",
        "--preset",
        "tiny",
        "--steps",
        "100000",
        "--out",
        str(tmp_path),
    )
    for line in process.stderr:
        if line.startswith("fp32: step"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert (
        err.strip().splitlines()[-1].startswith("train.py: stopped; the same command with --resume")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["fp32.state"]


@pytest.fixture
def short(monkeypatch):
    """A tiny preset that trains in two steps."""
    tiny = PRESETS["text"]["tiny"]
    recipe = replace(tiny.training, steps=2, length=32)
    monkeypatch.setitem(PRESETS["text"], "tiny", replace(tiny, training=recipe, validation=256))


@pytest.mark.slow
def test_fusion_trains_what_it_needs(short, tmp_path, monkeypatch):
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
def test_kv_cache_trains_what_it_needs_and_takes_every_flag(short, tmp_path, capsys):
    """The README's command without a model, then each flag that --help shows."""
    out, short_text = (
        ["--out", str(tmp_path), "--threads", "1"],
        ["--max-length", "64", "--max-new-tokens", "4"],
    )
    assert kv_cache.main([*out, *short_text]) == 0
    quantize.save(
        quantize.quantize_dynamic(quantize.load(tmp_path / "model.pth")), tmp_path / "int8.pth"
    )
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


def test_a_stopped_training_stops_the_script_that_needed_it(tmp_path, monkeypatch, capsys):
    """Ctrl-C while fusion.py or kv_cache.py train a model gives 130, as alone."""

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "fit", stopped)
    for program in (fusion, kv_cache):
        assert program.main(["--out", str(tmp_path)]) == 130
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert (
            line.startswith(f"{program.__name__}.py: stopped; uv run python train.py")
            and "--resume" in line
        )


@one_worker
@pytest.mark.slow
def test_resume_ends_with_the_same_weights(tmp_path, text_run, monkeypatch):
    """Stopped in the middle and resumed, the baseline is the uninterrupted run's, bit for bit."""
    arguments = [
        "--preset",
        "tiny",
        "--steps",
        "12",
        "--threads",
        "1",
        "--out",
        str(tmp_path),
        "--variants",
        "fp32",
    ]
    real, calls = training.next_token_loss, 0

    def interrupted(model, batch):
        nonlocal calls
        calls += 1
        if calls == 7:
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


def test_user_mistakes_are_one_line(tmp_path, capsys):
    """Missing, empty, short and unusable data, a folder that can't be written: exit code 2, one
    line, nothing written.
    """
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
        paths = [
            str(tmp_path / a) if a in ("missing.txt", "empty.txt", "short.txt", "folder") else a
            for a in arguments
        ]
        paths = [str(tmp_path / a) if a.startswith("file") else a for a in paths]
        where = [] if "--out" in arguments else ["--out", str(out)]
        assert train.main(["--preset", "tiny", *paths, *where]) == 2, arguments
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("train.py: error: "), lines
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        "--preset huge",
        "--task sound",
        "--steps 0",
        "--threads -1",
        "--seed -1",
        "--variants int9",
        "--device tpu",
        "--task image --data a b",
        "--unknown",
        "--steps many",
        "--threads 99999999999",
        "--seed 1e3",
        "--out=",
        "--variants ,",
        "--data=",
    ],
)
def test_flags_out_of_range(arguments, capsys):
    """A flag out of range exits with code 2 and names the flag."""
    assert train.main(arguments.split()) == 2
    flag = "--data" if "--data" in arguments else arguments.split()[0].strip("=")
    error = capsys.readouterr().err
    assert flag in error and error.startswith("train.py: error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        (fusion, "--batch 0"),
        (fusion, "--threads none"),
        (fusion, "--preset huge"),
        (fusion, "--model="),
        (fusion, "--backend x"),
        (kv_cache, "--max-new-tokens 0"),
        (kv_cache, "--temperature hot"),
        (kv_cache, "--seed -1"),
        (kv_cache, "--cache fp8"),
        (kv_cache, "--max-length 0"),
        (kv_cache, "--cache none --draft x"),
        (kv_cache, "--threads 0"),
        (kv_cache, "--out="),
    ],
)
def test_flags_of_the_other_scripts_out_of_range(program, arguments, capsys):
    """One line that names the flag, exit code 2."""
    assert program.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"{program.__name__}.py: error: ")
    assert arguments[-2] in error


def test_resume_of_another_run_is_refused(tmp_path, capsys):
    """A training state of another architecture: one line, and the file stays as it is."""
    jobs.prepare("tiny", out=tmp_path, steps=1).train()
    before = (tmp_path / "fp32.state").read_bytes()
    capsys.readouterr()
    assert (
        train.main(["--task", "image", "--preset", "tiny", "--out", str(tmp_path), "--resume"]) == 2
    )
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1 and "another run" in error[0]
    assert (tmp_path / "fp32.state").read_bytes() == before


@pytest.mark.parametrize("program", [train, fusion, kv_cache])
def test_help_shows_defaults(program, capsys):
    """`--help` runs without doing anything and shows commands to paste and every default."""
    assert program.main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: artifacts)" in text and f"uv run python {program.__name__}.py" in text
    assert text.count("(default: ") >= 6


def test_exit_codes_are_one_table(capsys):
    """Nothing, a mistake of each kind and Ctrl-C, with the message that it brings or the
    script's.
    """
    cases = [
        (None, script.DONE, ""),
        (ValueError("no\nsuch thing"), script.MISTAKE, "x.py: error: no such thing\n"),
        (
            OSError(28, "No space left on device", "a.pth"),
            script.MISTAKE,
            "x.py: error: a.pth: No space left on device\n",
        ),
        (KeyboardInterrupt(), script.STOPPED, "x.py: again\n"),
        (KeyboardInterrupt("go on so"), script.STOPPED, "x.py: go on so\n"),
        (SystemExit(7), 7, ""),
    ]
    for error, code, told in cases:

        def work(error=error):
            if error is not None:
                raise error

        assert script.exit_code("x.py", work, "again") == code
        assert capsys.readouterr().err == told
    assert (script.DONE, script.MISTAKE, script.STOPPED) == (0, 2, 130)


@one_worker
@pytest.mark.slow
def test_files_hold_the_recipes_that_made_them(text_run):
    """What is read back from a variant's file is the recipe of its row; the baseline has none."""
    preset = PRESETS["text"]["tiny"]
    known = recipes(replace(preset, training=replace(preset.training, steps=12)))
    assert list(known) == list(VARIANTS)
    for name, recipe in known.items():
        metadata = quantize.read_metadata(text_run / f"{name}.pth")
        assert Recipe.from_json(metadata["recipe"]) == recipe and recipe.name == name
    assert quantize.read_metadata(text_run / "model.pth") == {}
    steps = [
        step.technique for step in quantize.summary(text_run / "pruned+recovered+int8.pth").steps
    ]
    assert steps == ["pruned", "recover", "int8"]


def test_rows_are_named_as_ever():
    """The rows of earlier reports keep their names, and composed ones join them."""
    rows = (
        "fp16 bf16 int8 pruned pruned_recovered low_rank low_rank_recovered student student_int8"
    ).split()
    assert set(VARIANTS) == {*rows, "pruned+recovered+int8", "low_rank+recovered+int8"}


def test_scripts_are_thin_and_import_no_script():
    """60 to 120 lines each, and nothing imports one of them."""
    scripts = [ROOT / name for name in ("train.py", "fusion.py", "kv_cache.py")]
    assert all(60 <= len(path.read_text().splitlines()) <= 120 for path in scripts)
    for path in [
        *scripts,
        *(ROOT / "quantize").rglob("*.py"),
        *(ROOT / "benchmarks").rglob("*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module)
            assert not {"train", "fusion", "kv_cache"}.intersection(names), path
