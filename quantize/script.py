"""What the scripts and command lines share: how a mistake is told."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from quantize.checkpoint import CheckpointError
from quantize.measure import MeasurementError

MOST_THREADS = 1024  # libgomp ends the process where it can't start as many as it was told
MISTAKES = (CheckpointError, MeasurementError, ValueError, TypeError, OSError)


class Parser(argparse.ArgumentParser):
    """One line on standard error for a mistake, without the usage; no abbreviations of flags."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def count(text: str) -> int:
    """The value of a flag that is an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def threads(text: str) -> int:
    """The value of `--threads`."""
    value = count(text)
    if value > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{value} is more than {MOST_THREADS}")
    return value


def seed(text: str) -> int:
    """The value of `--seed`, as `torch.manual_seed` takes it."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{value} is not in 0 .. 2**63 - 1")
    return value


def path(text: str) -> Path:
    """The value of a flag that names a file or folder: an empty one would mean the present folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name; write . for the present folder")
    return Path(text)


def exit_code(name: str, work: Callable[[], None], stopped: str, quiet: bool = False) -> int:
    """Run `work`: 0, 2 after a mistake, told in one line, 130 after Ctrl-C, with what to do then.

    Args:
        name: of the script, before each line.
        work: what it does; may raise SystemExit for a code of its own.
        stopped: the line after Ctrl-C.
        quiet: whether another process tells the mistake (the other ranks of `torchrun`).
    """
    try:
        work()
    except MISTAKES as error:
        if not quiet:
            print(f"{name}: error: {in_words(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: {stopped}", file=sys.stderr)
        return 130
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


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
