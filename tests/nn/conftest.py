"""Fixtures for the layers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from quantize.native import build, conv, int8, isa, recurrent

# the least and the best always; tests/native meets all of them in every run
LEVELS = [
    level
    if level in (isa.levels()[0], isa.levels()[-1])
    else pytest.param(level, marks=pytest.mark.slow)
    for level in isa.levels()
]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernels are those of one instruction set, and every call is worth all threads."""
    if build.compiler() is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv(isa.SWITCH, request.param)
    monkeypatch.setattr(int8, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(int8, "_PRODUCTS_A_THREAD", 1)
    monkeypatch.setattr(recurrent, "_WORTH_THREADS", 1)
    caches = conv.functions, recurrent.functions, int8.functions
    for found in caches:
        found.cache_clear()
    yield request.param
    for found in caches:
        found.cache_clear()
