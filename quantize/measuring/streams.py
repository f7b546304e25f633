"""Standard streams that belong to one writer or reader: whatever else uses them, C++ too, is kept
away.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO


@contextmanager
def reserved_stdout() -> Iterator[BinaryIO]:
    """The real standard output; until the end, everything else that writes there goes to standard
    error.
    """
    sys.stdout.flush()
    real = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        yield real
    finally:
        sys.stdout.flush()
        real.flush()
        os.dup2(real.fileno(), 1)
        real.close()


def reserved_stdin() -> BinaryIO:
    """The real standard input; what else reads there (a child of `evaluate`, say) finds it
    empty.
    """
    real = os.fdopen(os.dup(0), "rb")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return real
