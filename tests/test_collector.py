"""Python's collector while a model is worked on."""

from __future__ import annotations

import gc
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


def test_what_was_there_before_is_looked_at_again_afterwards() -> None:
    old = weakref.ref(Knot())
    with pytest.raises(KeyError), looking_at_new_objects():
        raise KeyError
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert old() is None


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
