"""Python's collector while a model is worked on."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest

from quantize import collector
from quantize.collector import looking_at_new_objects


@pytest.fixture(autouse=True)
def nothing_frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process of the tests has frozen what it imported."""
    monkeypatch.setattr(collector, "_is_frozen_by_others", False)
    gc.unfreeze()
    yield
    gc.freeze()


class Knot:
    """Nobody but the collector frees it."""

    def __init__(self) -> None:
        self.own = self


def test_what_is_made_inside_is_freed() -> None:
    with looking_at_new_objects():
        new = weakref.ref(Knot())
        gc.collect()
        assert new() is None


AFTERWARDS = """
import gc, runpy, sys, weakref
looking_at_new_objects = runpy.run_path(sys.argv[1])["looking_at_new_objects"]

class Knot:
    def __init__(self):
        self.own = self

old = weakref.ref(Knot())
try:
    with looking_at_new_objects():
        gc.collect()
        assert old() is not None
        raise KeyError
except KeyError:
    assert gc.get_freeze_count() == 0
gc.collect()
assert old() is None
"""


def test_what_was_there_before_is_looked_at_again_afterwards() -> None:
    """In a Python of a few objects: here, a collection takes seconds."""
    command = [sys.executable, "-c", AFTERWARDS, collector.__file__]
    subprocess.run(command, check=True)


def test_what_a_process_has_frozen_itself_stays_frozen() -> None:
    gc.freeze()
    with looking_at_new_objects():
        pass
    assert gc.get_freeze_count() > 0


def test_what_is_frozen_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting walks over all of it."""
    gc.freeze()
    with looking_at_new_objects():
        pass
    monkeypatch.setattr(gc, "get_freeze_count", lambda: pytest.fail("counted again"))
    with looking_at_new_objects():
        pass
