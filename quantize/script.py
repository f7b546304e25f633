"""What the scripts and command lines share: how a mistake is told."""

from __future__ import annotations


def in_words(error: BaseException) -> str:
    """An error as one line for people: of the system's errors the path and the reason, without numbers.

    Args:
        error: what was raised, its message of any length.

    Returns:
        `"artifacts: exists and is not a folder"` instead of `"[Errno 17] File exists: 'artifacts'"`; never an empty line.
    """
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
        if isinstance(error, (FileExistsError, NotADirectoryError)):  # of mkdir, which takes folders that exist
            reason = "exists and is not a folder"
        places = [str(place) for place in (error.filename, error.filename2) if place is not None]
        message = ": ".join([" -> ".join(places), reason]) if places else reason
    return message or type(error).__name__
