"""What the scripts and command lines share: flags, how a mistake is told, exit codes."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from quantize.allocator import keep_allocations
from quantize.checkpoint import CheckpointError
from quantize.host import default_threads
from quantize.measuring.artifact import MeasurementError

DONE, MISTAKE, STOPPED = 0, 2, 130  # exit codes: all is written; a user's mistake; Ctrl-C
MISTAKES = (CheckpointError, MeasurementError, ValueError, TypeError, OSError)
MOST_THREADS = 1024  # libgomp ends the process where it can't start as many as it was told
AGAIN = "stopped; nothing was half written, run it again"


class Parser(argparse.ArgumentParser):
    """Flags with their defaults in the help; a mistake is one line on standard error, without the
    usage.

    Args:
        prog: the name of the script, before each line of an error.
        description: the script's docstring, shown as it stands.
    """

    def __init__(self, prog: str, description: str | None) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=form, allow_abbrev=False)

    def flag(self, name: str, text: str, **options: Any) -> None:
        """A flag that takes a value, with its default in the help. `options`: of `add_argument`."""
        self.add_argument(name, help=f"{text} (default: %(default)s)", **options)

    def error(self, message: str) -> NoReturn:
        self.exit(MISTAKE, f"{self.prog}: error: {' '.join(message.split())}\n")


def main(
    parser: Parser,
    argv: Sequence[str] | None,
    work: Callable[[argparse.Namespace], None],
    stopped: str = AGAIN,
) -> int:
    """Parse the flags, set the threads of `--threads`, and work.

    Args:
        parser: with the script's flags, `--threads` among them.
        argv: the arguments; None: those of the process.
        work: what the script does with its flags.
        stopped: the line after Ctrl-C, unless `work` says one with its KeyboardInterrupt.

    Returns:
        The exit code: 0, 2 after a mistake, which is told in one line, 130 after Ctrl-C.
    """

    def run() -> None:
        arguments = parser.parse_args(argv)
        torch.set_num_threads(arguments.threads or default_threads())
        keep_allocations()
        work(arguments)

    first_rank = os.environ.get("RANK", "0") == "0"
    return exit_code(parser.prog, run, stopped, quiet=not first_rank)


def given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of the flags of these names that have a value."""
    values = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def count(text: str) -> int:
    """The value of a flag that is an integer of at least 1."""
    value = _integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def minutes(text: str) -> float:
    """The value of `--minutes`."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < 10_000:
        raise argparse.ArgumentTypeError(f"{value:g} is not above 0 and below 10000")
    return value


def threads(text: str) -> int:
    """The value of `--threads`."""
    value = count(text)
    if value > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{value} is more than {MOST_THREADS}")
    return value


def seed(text: str) -> int:
    """The value of `--seed`, as `torch.manual_seed` takes it."""
    value = _integer(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{value} is not in 0 .. 2**63 - 1")
    return value


def imported(spec: str | None) -> Callable[..., Any] | None:
    """The value of a flag that names a function or class as `module:name`.

    Args:
        spec: the name; modules of the current folder count too. None gives None.

    Raises:
        ValueError: nothing importable has that name, or it can't be called.
    """
    if spec is None:
        return None
    module, _, name = spec.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a console script's path has its own folder only
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{spec!r} must be module:name of something importable: {error}"
        ) from error
    if not callable(found):
        raise ValueError(f"{spec!r} is not callable but {type(found).__name__}")
    return found


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None


def path(text: str) -> Path:
    """The value of a flag that names a file or folder: an empty one would mean the present
    folder.
    """
    if not text:
        raise argparse.ArgumentTypeError("an empty name; write . for the present folder")
    return Path(text)


def exit_code(name: str, work: Callable[[], None], stopped: str, quiet: bool = False) -> int:
    """Run `work`: 0, 2 after a mistake, told in one line, 130 after Ctrl-C, with what to do then.

    Args:
        name: of the script, before each line.
        work: what it does; may raise SystemExit for a code of its own.
        stopped: the line after Ctrl-C; a KeyboardInterrupt with a message says that instead.
        quiet: whether another process tells the mistake (the other ranks of `torchrun`).
    """
    try:
        work()
    except MISTAKES as error:
        if not quiet:
            print(f"{name}: error: {in_words(error)}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt as stop:
        print(f"{name}: {stop if stop.args else stopped}", file=sys.stderr)
        return STOPPED
    except SystemExit as stop:
        return int(stop.code or DONE)
    return DONE


def in_words(error: BaseException) -> str:
    """An error as one line for people: of the system's errors the path and the reason, without
    numbers.

    Args:
        error: what was raised, its message of any length.

    Returns:
        `"artifacts: exists and is not a folder"` instead of `"[Errno 17] File exists:
        'artifacts'"`; never an empty line.
    """
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            # mkdir takes folders that exist
            reason = "exists and is not a folder"
        places = [str(place) for place in (error.filename, error.filename2) if place is not None]
        message = ": ".join([" -> ".join(places), reason]) if places else reason
    return message or type(error).__name__
