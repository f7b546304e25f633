"""How the scripts fail: flags out of range, data that isn't there, exit codes."""

import pytest

import fusion
import kv_cache
import train
from quantize import jobs, script, training
from quantize.jobs.presets import VARIANTS


@pytest.mark.slow
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
        "--budget speedup",
        "--budget speedup=0",
        "--budget pace=2",
        "--minutes soon",
        "--minutes 0",
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


@pytest.mark.slow
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


def test_rows_are_named_as_ever():
    """The rows of earlier reports keep their names, and composed ones join them."""
    rows = (
        "fp16 bf16 int8 pruned pruned_recovered low_rank low_rank_recovered student student_int8"
    ).split()
    assert set(VARIANTS) == {*rows, "pruned+recovered+int8", "low_rank+recovered+int8"}
