"""The `quantize` command: `quantize COMMAND ...`, and the same as `python -m quantize COMMAND
...`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from quantize.script import DONE, MISTAKE


@dataclass(frozen=True)
class Command:
    """One command of the table.

    Args:
        module: has `main(argv)`, which returns the exit code; imported when the command is run.
        about: what it does, in a line.
    """

    module: str
    about: str


COMMANDS = {
    "compress": Command("quantize.commands.compress", "find the best model within a budget"),
    "measure": Command("quantize.measuring.command", "measure one file, as one JSON line"),
    "report": Command("quantize.commands.report", "print a report, and write its pages again"),
    "verify": Command("quantize.commands.verify", "measure again, and say which claims hold"),
    "generate": Command("quantize.commands.generate", "continue a text with a language model"),
    "serve": Command("quantize.commands.serve", "answer requests over HTTP"),
    "doctor": Command("quantize.commands.doctor", "say what this machine has, and what it lacks"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command with the rest of the arguments; returns its exit code.

    Args:
        argv: the command's name and its arguments; None: those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        module = importlib.import_module(COMMANDS[arguments[0]].module)
        return module.main(arguments[1:])
    if arguments and arguments[0] in ("-h", "--help"):
        print(_help())
        return DONE
    given = f"no command {arguments[0]!r}" if arguments else "no command given"
    print(f"quantize: error: {given}; {_usage()}", file=sys.stderr)
    return MISTAKE


def _usage() -> str:
    return f"usage: quantize {{{','.join(COMMANDS)}}} ..."


def _help() -> str:
    lines = [f"  {name:10}{command.about}" for name, command in COMMANDS.items()]
    return "\n".join([_usage(), "", *lines, "", "quantize COMMAND --help tells more."])
