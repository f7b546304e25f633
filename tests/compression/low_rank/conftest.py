"""What all tests of low rank start from."""

from __future__ import annotations

import math

import pytest

from quantize.compression.low_rank import timing


@pytest.fixture(autouse=True)
def _untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer takes long enough to be timed: ranks are the same on every machine."""
    monkeypatch.setattr(timing, "LONG_ENOUGH", math.inf)
