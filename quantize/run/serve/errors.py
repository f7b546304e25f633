"""A request that isn't answered, and why: one line for its sender, with the status of HTTP."""

from __future__ import annotations

from reprlib import Repr
from typing import Any

RETRY_AFTER_S = 1


class Refused(Exception):
    """A request is refused.

    Args:
        message: one line for people: the input, its value and what is allowed; no path, no prompt.
        status: of HTTP; 4xx is the sender's mistake, 503 a full queue.
        field: the part of the request that is wrong.
    """

    def __init__(self, message: str, *, status: int = 400, field: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.field = message, status, field

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the answer."""
        if self.status == 503:
            return {"Retry-After": str(RETRY_AFTER_S)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


def busy(waiting: int) -> Refused:
    """The queue is full."""
    return Refused(f"{waiting} requests wait already; try again in {RETRY_AFTER_S} s", status=503)


def error_body(refused: Refused) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if refused.status < 500 else "server_error"
    error = {"message": refused.message, "type": kind, "param": refused.field, "code": None}
    return {"error": error}


def short(value: object) -> str:
    """A value of a request in about 80 characters at most, soon, however large it is."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


_SHORT = Repr()
_SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother = 40, 100, 100
