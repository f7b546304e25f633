"""A sample of hostile and damaged files (see hostile.py): each loads or is a CheckpointError, none
runs code.
"""

from __future__ import annotations

import hostile
import pytest

from quantize.checkpoint import CheckpointError


@pytest.mark.parametrize(
    "kind", range(len(hostile.KINDS)), ids=[kind.__name__ for kind in hostile.KINDS]
)
def test_every_refusal_is_a_checkpoint_error(tmp_path, monkeypatch, kind):
    """Of 12 files of each kind; benchmarks/hostile.py tries 1400, with limits on time and
    memory.
    """
    monkeypatch.chdir(tmp_path)
    loaded = 0
    for number in range(kind, 12 * len(hostile.KINDS), len(hostile.KINDS)):
        _, path = hostile.make(number, tmp_path)
        try:
            hostile.load(path)
            loaded += 1
        except CheckpointError as error:
            assert str(path) in str(error) and "\n" not in str(error)
    assert loaded < 12 and not (tmp_path / hostile.MARK).exists()
