"""The `quantize` command: `quantize COMMAND ...`, and the same as `python -m quantize COMMAND
...`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quantize.measuring import command as measuring
from quantize.script import DONE, MISTAKE

COMMANDS = {"measure": measuring.main}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command with the rest of the arguments; returns its exit code.

    Args:
        argv: the command's name and its arguments; None: those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    usage = f"usage: quantize {{{','.join(COMMANDS)}}} ..."
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"{usage}\nquantize COMMAND --help tells more.")
        return DONE
    given = f"no command {arguments[0]!r}" if arguments else "no command given"
    print(f"quantize: error: {given}; {usage}", file=sys.stderr)
    return MISTAKE
