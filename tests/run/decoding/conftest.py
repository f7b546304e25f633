"""Decoding in native code, compiled before a test begins."""

from __future__ import annotations

import pytest

from quantize.run.decoding.structs import KERNELS


@pytest.fixture(scope="session")
def compiled() -> None:
    """The decoding step lies in the user's cache folder and is loaded."""
    KERNELS.best()
