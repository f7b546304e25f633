"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets a text through up to the first stop string, which isn't let through.

    What may be the beginning of one is held back until more is known.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = tuple(strings)
        self.stopped = False
        self._held = ""

    def feed(self, piece: str) -> str:
        """The text that is certain after one more piece."""
        if self.stopped:
            return ""
        text = self._held + piece
        places = [text.find(string) for string in self.strings]
        found = [place for place in places if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, string) for string in self.strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, at the end of the text."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, string: str) -> int:
    """Characters at the end of `text` that `string` begins with, fewer than all of it."""
    for count in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:count]):
            return count
    return 0
