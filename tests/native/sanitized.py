"""Run the tests of native code on a build that stops at wrong addresses and undefined behaviour.

    uv run python tests/native/sanitized.py
    uv run python tests/native/sanitized.py -k bits
    uv run python tests/native/sanitized.py tests/run/decoding/test_decoding.py

Every library is covered: int8.cpp, bfloat16.cpp, conv.cpp, recurrent.cpp and decoding's step.cpp.

Needs g++ with its sanitizers (libasan, libubsan), on Linux. Started by pytest as a plugin, it adds
the flags to every library that is compiled; started as a script, it starts pytest so, with the
sanitizers' libraries loaded before Python. Leaks aren't looked for: Python has too many.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1")
ROOT = Path(__file__).parents[2]
TESTS = (
    "tests/native",
    "tests/compression/test_int8_activations.py",
    "tests/nn/test_int8_conv.py",
    "tests/nn/test_int8_recurrent.py",
    "tests/nn/test_int8_calls.py",
    "tests/nn/test_int8_slices.py",
    "tests/nn/test_floats.py",
    "tests/run/decoding/test_decoding_caches.py",
)


def pytest_configure() -> None:
    """Compile with FLAGS from here on, for this process only."""
    from quantize.native import toolchain

    toolchain.FLAGS = (*toolchain.FLAGS, *FLAGS)


def library(name: str) -> str:
    """The path of a library of g++. Raises FileNotFoundError."""
    command = ["g++", f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        raise FileNotFoundError(f"g++ has no {name}")
    return path


def main() -> int:
    """Run pytest on TESTS, with the arguments of the command line."""
    options = ["-n", "0", "-p", "sanitized", *TESTS, *sys.argv[1:]]
    command = [sys.executable, "-m", "pytest", *options]
    preloaded = [library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    with tempfile.TemporaryDirectory(prefix="quantize-") as cache:
        environment = os.environ | {
            "ASAN_OPTIONS": "detect_leaks=0",
            "LD_PRELOAD": " ".join(preloaded),
            "PYTHONPATH": str(Path(__file__).parent),
            "XDG_CACHE_HOME": cache,
        }
        return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main())
