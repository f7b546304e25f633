"""What tells people how far a long call is: a function that is called with a line before
each stage.
"""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Says nothing."""
