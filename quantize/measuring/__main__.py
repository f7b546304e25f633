"""The processes in which artifacts are measured: `--nursery` forks them, `--serve` is one. Started
by `process.py` only.
"""

import socket
import sys

from quantize.measuring.child import nursery, preload, serve
from quantize.measuring.streams import reserved_stdin, reserved_stdout

if __name__ == "__main__":
    if sys.argv[1] == "--nursery":  # each worker that it forks comes back from it
        preload(sys.argv[2:])
        nursery(socket.socket(fileno=0))
    requests = reserved_stdin()
    with reserved_stdout() as replies:
        serve(requests, replies)
