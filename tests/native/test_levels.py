"""Kernels compile for every level of instruction sets, those of other machines too."""

from __future__ import annotations

from pathlib import Path

import pytest
from fresh import ROOT

from quantize.native import isa, toolchain

SOURCES = sorted((ROOT / "quantize").rglob("*.cpp"), key=lambda source: source.stem)


@pytest.mark.slow
@pytest.mark.skipif(toolchain.compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("level", [n for n in toolchain.levels() if n not in isa.levels()])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_levels_that_this_machine_lacks(source: Path, level: str) -> None:
    """The others are compiled by the tests that run them."""
    target = toolchain.Target(source, level)
    flags = [*target.flags, f"-I{toolchain.HERE}", "-O0", "-fsyntax-only", "-fopenmp"]
    done = toolchain.run([*toolchain.compiler(), *flags, str(source)])
    assert done.returncode == 0, done.stderr.decode()
