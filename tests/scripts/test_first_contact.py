"""What a person sees first: errors, progress, charts and the standard error of the scripts."""

from __future__ import annotations

import io
import math
import os

import pytest
from fresh import python
from matplotlib.figure import Figure

import train
from quantize.jobs import caching
from quantize.script import in_words
from quantize.training import Progress, ProgressPrinter


def raised(action) -> Exception:
    with pytest.raises(Exception) as caught:
        action()
    return caught.value


def test_errors_of_the_system_name_the_path_and_the_reason(tmp_path):
    """No bare numbers, one line, never nothing."""
    file = tmp_path / "file"
    file.touch()
    assert (
        in_words(raised(lambda: file.mkdir(exist_ok=True))) == f"{file}: exists and is not a folder"
    )
    assert (
        in_words(raised((file / "below").touch)) == f"{file / 'below'}: exists and is not a folder"
    )
    assert in_words(raised(tmp_path.read_bytes)) == f"{tmp_path}: Is a directory"
    assert (
        in_words(raised((tmp_path / "none").read_bytes))
        == f"{tmp_path / 'none'}: No such file or directory"
    )
    assert in_words(raised(lambda: (tmp_path / "a").rename(tmp_path / "b"))).startswith(
        f"{tmp_path / 'a'} -> "
    )
    assert in_words(OSError(28, "No space left on device")) == "No space left on device"
    assert in_words(ValueError("two\nlines")) == "two lines"
    assert in_words(ValueError()) == "ValueError"


@pytest.mark.slow
def test_a_script_says_them(tmp_path, capsys):
    """`--out` that is a file: exit code 2 and one line with the path."""
    (tmp_path / "file").touch()
    assert train.main(["--preset", "tiny", "--out", str(tmp_path / "file")]) == 2
    assert (
        capsys.readouterr().err
        == f"train.py: error: {tmp_path / 'file'}: exists and is not a folder\n"
    )


@pytest.mark.parametrize(
    ("loss", "shown"), [(5.5451, "5.545"), (0.000432, "0.000432"), (3.2e-7, "3.2e-07"), (0.0, "0")]
)
def test_a_small_loss_is_not_shown_as_nothing(loss, shown):
    """A student that answers like its teacher still has digits."""
    out = io.StringIO()
    with ProgressPrinter("student", stream=out) as printer:
        printer(Progress(step=1, steps=1, loss=loss, units_per_s=1.0, seconds_left=0.0))
    assert f"loss {shown}  " in out.getvalue()


@pytest.mark.parametrize(
    ("low", "high"), [(0.2, 40.0), (0.031, 0.9), (2.2, 2.7), (180.0, 41_000.0), (1.0, 1.0)]
)
def test_ticks_of_the_cache_chart_are_plain_numbers(monkeypatch, low, high):
    """2 to 12 labels on the axis of times, written as people write them."""
    figures: list[Figure] = []
    real = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, *args, **options: (figures.append(self), real(self, *args, **options)),
    )
    rows = [
        {"way": "cache", "length": n, "ms_per_token": t}
        for n, t in ((64, low), (128, math.sqrt(low * high)), (975, high))
    ]
    assert caching.chart(rows).startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    bottom, top = axes.get_ylim()
    labels = [
        t.get_text()
        for t, y in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)
        if bottom <= y <= top
    ]
    labels += [t.get_text() for t in axes.get_yticklabels(minor=True) if t.get_text()]
    assert 2 <= len(labels) <= 12
    assert [f"{float(label):g}" for label in labels] == labels


@pytest.mark.slow
@pytest.mark.xdist_group("fresh")
def test_counting_kernels_prints_nothing():
    """The profiler of a torch built for GPUs complains of those that aren't there, past Python's
    streams.
    """
    counted = "kernel_calls(torch.nn.Linear(4, 4), torch.zeros(2, 4)).total() > 0"
    code = f"import torch; from quantize.jobs.fusing import kernel_calls; print({counted})"
    environment = dict(os.environ)
    environment.pop("KINETO_LOG_LEVEL", None)
    result = python("-c", code, environment=environment)
    assert (result.stdout, result.stderr) == ("True\n", "")
