"""A wheel carries compiled kernels, and whoever installs it needs no compiler."""

from __future__ import annotations

import os
import shlex
import shutil
import zipfile
from pathlib import Path

import pytest
from fresh import ROOT, python

from quantize.commands.doctor import KERNELS
from quantize.native import toolchain

SOURCES = ("quantize", "setup.py", "pyproject.toml", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
# Answers of every library, and where the process found it.
ANSWERS = """
import hashlib, warnings, torch, quantize
from torch import nn
from quantize.commands import doctor
from quantize.nn import int8_kernels
from quantize.run.decoding.native import Step

warnings.simplefilter("ignore")
torch.manual_seed(0)
image = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)).eval()
decoder = quantize.DecoderLM(quantize.DecoderConfig(vocab_size=61, width=32, layers=2, heads=4))
inputs = [(image, torch.randn(2, 3, 8, 8)), (nn.LSTM(24, 16).eval(), torch.randn(5, 2, 24))]
small = [(quantize.quantize_dynamic(model, prefer="size"), x) for model, x in inputs]
with int8_kernels.kernel("native"), torch.no_grad():
    answers = [model(x) for model, x in small]
    answers[1] = answers[1][0]
    quantized = quantize.quantize_dynamic(decoder.eval(), prefer="size")
    for model in (decoder, quantized, quantize.quantize_weights(decoder)):
        cache = quantize.KVCache.for_model(model, batch=2)
        model(torch.arange(10).reshape(2, 5), cache)
        answers.append(Step(model)(torch.tensor([[1], [2]]), cache, 0))
for answer in answers:
    print(hashlib.sha256(answer.numpy().tobytes()).hexdigest())
print(quantize.__file__, doctor.facts()["kernels"])
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("fresh"),
    pytest.mark.skipif(toolchain.compiler() is None, reason="needs a C++ compiler"),
]


def run(*command: str, where: Path, **environment: str) -> str:
    """What a process prints."""
    done = python("-c", *command, where=where, environment=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def built(folder: Path, **environment: str) -> tuple[Path, str]:
    """A wheel of the source tree, and what was said while it was built."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    said = run(BUILD, str(folder), where=source, **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel, said


def test_a_wheel_needs_no_compiler(tmp_path):
    """Built by an old compiler, run without one: the best level that is carried, the same bits."""
    old = tmp_path / "old"
    old.write_text(
        '#!/bin/sh\ncase "$*" in *-mavx512f*) echo unknown flag >&2; exit 1;; esac\n'
        f'exec {shlex.join(toolchain.compiler())} "$@" -O0\n'
    )
    old.chmod(0o755)
    wheel, said = built(tmp_path / "wheel", CXX=str(old))
    assert "-py3-none-" in wheel.name and "-any" not in wheel.name
    assert ("carries no int8 for amx: " in said) == toolchain.IS_X86
    installed, cache = tmp_path / "installed", tmp_path / "cache"
    zipfile.ZipFile(wheel).extractall(installed)
    alone = {"PYTHONPATH": str(installed), "PATH": "", "CXX": "", "XDG_CACHE_HOME": str(cache)}
    *answers, origins = run(ANSWERS, where=tmp_path, **alone).splitlines()
    *expected, _ = run(ANSWERS, where=ROOT).splitlines()
    assert answers == expected
    assert str(installed) in origins and origins.count("carried by this package") == len(KERNELS)
    # damaged libraries are not mapped
    for library in installed.rglob("*.so"):
        library.write_bytes(library.read_bytes()[:-100])
    show = "from quantize.commands import doctor; print(doctor.facts()['kernels'])"
    shown = run(show, where=tmp_path, **alone)
    assert shown.count("is damaged") == len(KERNELS)


def test_a_wheel_without_a_compiler_is_pure(tmp_path):
    """It says so in one line."""
    wheel, said = built(tmp_path / "wheel", CXX="", PATH="")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert said.count("the wheel carries no compiled kernels") == 1
