"""Python's collector of cycles while a model is worked on.

A process that has imported torch holds about a million objects, and a full collection looks at all
of them: half a second each, where tracing a model makes enough objects to call for several.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Counting what is frozen means a walk over all of it: a process that has frozen something walks
# once, and is taken to have it frozen from then on.
_is_frozen_by_others = False


@contextmanager
def looking_at_new_objects() -> Iterator[None]:
    """Inside, the collector looks only at what was made since; afterwards at everything again.

    What a process has frozen itself (`gc.freeze`, before it forks) stays frozen. Works as a
    decorator too.
    """
    global _is_frozen_by_others
    _is_frozen_by_others = _is_frozen_by_others or gc.get_freeze_count() > 0
    if _is_frozen_by_others:
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
