"""Fields of a JSON request, checked one by one; an unknown one is refused by name, since an answer
that leaves out what was asked for looks like one that doesn't.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantize.run.serve.errors import Refused, short

MOST_ID = 2**63
_MOST_CHARACTERS = 64  # of a text, for each token that its model reads: words have fewer


class Fields:
    """The fields of a request, each to be asked for once; `end` refuses those that nobody asked
    for.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._left = dict(content)

    def take(self, name: str, default: Any = None) -> Any:
        """A field as it stands; null counts as left out."""
        value = self._left.pop(name, None)
        return default if value is None else value

    def integer(self, name: str, default: Any, low: int, high: int) -> Any:
        """An integer from `low` to `high`."""
        value = self.take(name)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise wrong(name, value, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, default: Any, low: float, high: float) -> Any:
        """A number from `low` to `high`."""
        value = self.take(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not low <= value <= high:
            raise wrong(name, value, f"a number from {low} to {high}")
        return value

    def flag(self, name: str) -> bool:
        """True or false; false where it is left out."""
        value = self.take(name, False)
        if type(value) is not bool:
            raise wrong(name, value, "true or false")
        return value

    def strings(self, name: str, most: int) -> list[str]:
        """A string or a list of up to `most`, none of them empty."""
        value = self.take(name, [])
        given = [value] if isinstance(value, str) else value
        whole = isinstance(given, list) and len(given) <= most
        if not whole or not all(isinstance(each, str) and each for each in given):
            raise wrong(name, value, f"a string, or a list of up to {most}")
        return given

    def only(self, name: str, *allowed: Any) -> None:
        """A field that may only say what is done anyway."""
        value = self._left.pop(name, None)
        if value is not None and value not in allowed:
            listed = ", ".join(map(repr, allowed)) or "leave it out"
            raise wrong(name, value, listed)

    def ignore(self, *names: str) -> None:
        """Fields that change no answer."""
        for name in names:
            self._left.pop(name, None)

    def end(self) -> None:
        """Raises Refused if a field is left."""
        for name in self._left:
            raise Refused(f"no field {short(name)} is known here", field=str(name)[:80])


def wrong(name: str, value: object, allowed: str) -> Refused:
    """A field's value isn't allowed."""
    return Refused(f"{name} is {short(value)}; allowed: {allowed}", field=name)


def is_ids(value: object) -> bool:
    """Whether a value is a list of integers that a tensor of token ids holds."""
    if not isinstance(value, list) or not value:
        return False
    return all(type(each) is int and -MOST_ID <= each < MOST_ID for each in value)


def texts(name: str, value: object, most: int) -> list[str | list[int]]:
    """One or several texts, as strings or as token ids.

    Raises:
        Refused: none, more than `most`, or something else.
    """
    given: Any = [value] if isinstance(value, str) or is_ids(value) else value
    if not isinstance(given, list) or not 0 < len(given) <= most:
        raise wrong(name, value, f"a text, or a list of up to {most}, as strings or token ids")
    for each in given:
        if not isinstance(each, str) and not is_ids(each):
            raise wrong(name, each, "a text, or a list of token ids")
    return given


def check_length(text: str, most_tokens: int) -> None:
    """Refuse a text that is far too long before a tokenizer, which nothing interrupts, reads it."""
    most = _MOST_CHARACTERS * most_tokens
    if len(text) > most:
        raise Refused(f"a text has {len(text)} characters; allowed: {most}")
